"""Writes the Kubernetes job of an experiment, one process a pod: ... --image=IMAGE --claim=CLAIM | kubectl apply -f -

--config, --workdir and --config.FIELD=VALUE are those of `prefalign train`. The Dockerfile makes the image. The claim
is of a volume that all pods mount at /runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from prefalign_jax.cli.experiments import config_of
from prefalign_jax.cli.parser import Parser, add_config
from prefalign_jax.exits import status_of
from prefalign_jax.types import UserError

TEMPLATE = Path(__file__).with_suffix(".yaml")
VOLUME = PurePosixPath("/runs")
LONGEST_NAME = 50  # a pod's name has a number after it, and 63 letters at most


def manifest(
    train: Sequence[str], *, name: str, image: str, claim: str, pods: int = 1, gpus: int = 8
) -> list[dict[str, Any]]:
    """The objects of a job.

    Args:
      train: options of `prefalign train`.
      name: of the job.
      image: has prefalign as its entry point.
      claim: name of a claim of a volume that the pods share.
      pods: how many, with one process each.
      gpus: of each pod.
    """
    words = {"NAME": name, "IMAGE": image, "CLAIM": claim}
    service, job = (_filled(one, words) for one in yaml.safe_load_all(TEMPLATE.read_text(encoding="utf-8")))
    job["spec"] |= {"completions": pods, "parallelism": pods}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["args"] += train
    container["resources"]["limits"]["nvidia.com/gpu"] = gpus
    next(one for one in container["env"] if one["name"] == "JAX_NUM_PROCESSES")["value"] = str(pods)
    return [service, job]


def _filled(tree: Any, words: Mapping[str, str]) -> Any:
    """The tree with each word in place of its name."""
    if isinstance(tree, dict):
        return {key: _filled(value, words) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, words) for value in tree]
    return re.sub(r"\b(NAME|IMAGE|CLAIM)\b", lambda name: words[name[0]], tree) if isinstance(tree, str) else tree


def main(argv: Sequence[str]) -> int:
    """Prints the objects as YAML."""
    parser = Parser("python scripts/launch/kubernetes.py", __doc__)
    add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help=f"of the run, below {VOLUME}")
    parser.add_argument("--image", required=True, help="where the cluster finds the Dockerfile's image")
    parser.add_argument("--claim", required=True, help="name of the PersistentVolumeClaim")
    parser.add_argument("--pods", type=int, default=1, metavar="N", help="how many pods, 1 by default")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a pod, 8 by default")
    parser.add_argument("--name", help="of the job; by default the experiment's, without what follows the colon")
    options, words = parser.read_with_fields(argv)
    config_of(options.config, words)  # a mistake is said here, not in the cluster
    if VOLUME not in PurePosixPath(options.workdir).parents:
        raise UserError(f"--workdir={options.workdir} is not on the volume; write a directory below {VOLUME}")
    if min(options.pods, options.gpus) < 1:
        raise UserError(f"--pods={options.pods} and --gpus={options.gpus} must be at least 1")
    experiment = options.config.partition(":")[0].removesuffix(".py")
    name = options.name or re.sub(r"[^a-z0-9]+", "-", PurePosixPath(experiment).name.lower()).strip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"--name={name!r}: write at most {LONGEST_NAME} small letters, digits and hyphens, with a letter first"
        )
    train = [f"--config={options.config}", f"--workdir={options.workdir}", *words]
    sizes = dict(pods=options.pods, gpus=options.gpus)
    objects = manifest(train, name=name, image=options.image, claim=options.claim, **sizes)
    yaml.safe_dump_all(objects, sys.stdout, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(sys.argv[1:])))
