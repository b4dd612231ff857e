"""Search the settings of meta-training, as a job.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env jobs/runtime-env.yaml -- \\
        python jobs/tune.py --config tune_configs/joint.yaml --store /shared/store --out /shared/sweeps/joint

Submit it from the project's folder. The token is in `~/.ray/auth_token` of the head; from another machine, put
it there or into `RAY_AUTH_TOKEN`. The options are those of `supmer tune`. `--out` is an absolute path that every
node sees, `--store` one as well or a URI; `--config` may be a file of the project's folder. `ray job stop` keeps
what is finished: submit the same command with `--resume` to go on with it.
"""

import sys

from supmer_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
