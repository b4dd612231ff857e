"""What a run shows while it goes on.

The rows of a run's metrics file go in; Prometheus series on every node's metrics port come out (`series`),
a Grafana dashboard that queries them (`dashboard`), and, where wanted, TensorBoard, MLflow or Weights &
Biases (`loggers`).
"""
