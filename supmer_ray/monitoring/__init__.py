"""What a run shows while it goes on.

The rows of a run's metrics file go in; Prometheus series on the metrics port of rank 0's node come out (`series`), a
Grafana dashboard that queries them (`dashboard`), and, where wanted, TensorBoard, MLflow or Weights & Biases
(`loggers`).
"""
