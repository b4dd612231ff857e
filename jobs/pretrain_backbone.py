"""Train the embedded backbone anew and write it with its card.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env jobs/runtime-env.yaml -- \\
        python jobs/pretrain_backbone.py --output /shared/backbone

Submit it from the project's folder. The token is in `~/.ray/auth_token` of the head; from another machine, put
it there or into `RAY_AUTH_TOKEN`. It is one process that needs no Ray of its own, on the head, where
`--output` is an absolute path; run it again with the same settings to go on from the last checkpoint. The package
ships the `weights.safetensors` and the `CARD.md` that it writes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from supmer_ray.embedded.pretrain import PretrainConfig, pretrain
from supmer_ray.errors import UserError, is_disk_full


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, weights and card")
    for field in fields(PretrainConfig):
        kind = int if field.default is None else type(field.default)
        choices = ("bfloat16", "float32") if field.name == "precision" else None
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, choices=choices)
    options = vars(parser.parse_args())
    output = options.pop("output")
    command = shlex.join(["python", "jobs/pretrain_backbone.py", *sys.argv[1:]])
    try:
        pretrain(output, PretrainConfig(**options), command)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"No room is left where {output} lies; make some and give the command again.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
