"""Compare methods on few-shot tasks, as a job.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env jobs/runtime-env.yaml -- \\
        python jobs/evaluate.py --suite open --store /shared/store --out /shared/results/open

Submit it from the project's folder. The token is in `~/.ray/auth_token` of the head; from another machine, put
it there or into `RAY_AUTH_TOKEN`. The options are those of `supmer evaluate`. `--out` is an absolute path that
every node sees; `--store` and checkpoints are such paths, or URIs of an object store. A job that was stopped goes
on with `--resume` behind the same command.
"""

import sys

from supmer_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
