"""What the meta-step costs, measured: `python -m supmer_ray.benchmark --help`. Ray is needed by `--data` alone."""
