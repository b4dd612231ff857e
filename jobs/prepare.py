"""Build a store from text, as a job.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env jobs/runtime-env.yaml -- \\
        python jobs/prepare.py --source s3://bucket/articles/ --domains 250 --out /shared/store

Submit it from the project's folder. The token is in `~/.ray/auth_token` of the head; from another machine, put
it there or into `RAY_AUTH_TOKEN`. The options are those of `supmer prepare`. `--out` is an absolute path that
every node sees, as are the sources that are paths, or a URI (`s3://…`). A job that was stopped leaves no store, at most
a hidden folder beside it (docs/operations.md): submit it again.
"""

import sys

from supmer_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
