"""What a step takes on devices that are not here: --config=NAME[:ARG] --devices=64 --device=h200 [--config.x=y].

Compiles the step for simulated devices, without the weights and the data, and prints the memory of a device, the
operations, the bytes sent, the time that a step may take, and with --pairs that of a run. --mesh=fsdp=8
--mesh=data=2,fsdp=4 compares several meshes in a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefalign_jax.cli.experiments import config_of
from prefalign_jax.cli.parser import Parser, add_config
from prefalign_jax.cost.chips import CHIPS
from prefalign_jax.cost.shapes import SHAPES
from prefalign_jax.options import choose
from prefalign_jax.types import UserError


def main(argv: Sequence[str]) -> int:
    """Plans a step of the config and prints it."""
    parser = Parser("prefalign plan", __doc__)
    add_config(parser)
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--device", required=True, metavar="KIND", help=", ".join(CHIPS))
    parser.add_argument("--model", metavar="SHAPE", help="in place of config.model.path; `prefalign list shapes`")
    what = "sizes of its axes in place of config.mesh, with commas; repeatable, for a table"
    parser.add_argument("--mesh", action="append", default=[], metavar="AXIS=N", help=what)
    parser.add_argument("--pairs", type=int, metavar="N", help="in a data set, to say how many days the run takes")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="of every prompt; half of max_length by default")
    parser.add_argument("--response", type=int, metavar="TOKENS", help="of every response; half of max_length")
    options, words = parser.read_with_fields(argv)
    choose("--device", options.device, CHIPS)
    if options.model:
        choose("--model", options.model, SHAPES)
    if options.devices < 1:
        raise UserError(f"--devices={options.devices} must be at least 1")
    if options.pairs is not None and options.pairs < 1:
        raise UserError(f"--pairs={options.pairs} must be at least 1")
    meshes = [_sizes(word) for word in options.mesh]
    config = config_of(options.config, words)
    import jax

    from prefalign_jax.cost.plan import plan, report, shape_of, table
    from prefalign_jax.models.hf_io import load_config, resolve
    from prefalign_jax.sharding import make_mesh

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    shape = shape_of(options.model) if options.model else load_config(resolve(config.model.path or "."))
    made = [make_mesh(sizes, jax.devices()[: options.devices]) for sizes in meshes or [config.mesh]]
    steps = [plan(config, shape, mesh, prompt=options.prompt, response=options.response) for mesh in made]
    last = config, options.device, options.pairs
    print(report(*steps, *last) if len(steps) == 1 else table(steps, *last))
    return 0


def _sizes(word: str) -> dict[str, int]:
    """Sizes of a mesh's axes.

    Raises:
      UserError: the word is not AXIS=N,AXIS=N.

    Example:
      >>> _sizes("data=2,fsdp=-1")
      {'data': 2, 'fsdp': -1}
    """
    sizes = dict(part.partition("=")[::2] for part in word.split(","))
    if not all(re.fullmatch(r"-?\d+", size) for size in sizes.values()):
        raise UserError(f"--mesh={word!r}: write AXIS=N with commas, such as data=2,fsdp=4")
    return {axis: int(size) for axis, size in sizes.items()}
