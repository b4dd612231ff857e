"""Meta-train on a store, as a job.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env jobs/runtime-env.yaml -- \\
        python jobs/train.py --store /shared/store --out /shared/runs/first --set workers.count=4

Submit it from the project's folder. The token is in `~/.ray/auth_token` of the head; from another machine, put
it there or into `RAY_AUTH_TOKEN`. The options are those of `supmer train`. `--store` and `--out` are absolute
paths that every node sees, or URIs (`s3://…`). It waits until the cluster has free what it needs.
`ray job stop` leaves a snapshot: submit the same command with `--resume` to go on with it.
"""

import sys

from supmer_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
