"""What a step takes on devices that are not here: --config=NAME[:ARG] --devices=64 --device=h200 [--config.x=y].

Compiles the step for simulated devices, without the weights and the data, and prints the memory of a device, the
operations, the bytes sent and the time that a step may take.
"""

from __future__ import annotations

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
    parser.add_argument("--model", metavar="SHAPE", help=f"in place of config.model.path: {', '.join(SHAPES)}")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="of every prompt; half of max_length by default")
    parser.add_argument("--response", type=int, metavar="TOKENS", help="of every response; half of max_length")
    options, words = parser.read_with_fields(argv)
    choose("--device", options.device, CHIPS)
    if options.devices < 1:
        raise UserError(f"--devices={options.devices} must be at least 1")
    config = config_of(options.config, words)
    import jax

    from prefalign_jax.cost.plan import plan, report, shape_of
    from prefalign_jax.models.hf_io import load_config, resolve
    from prefalign_jax.sharding import make_mesh

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    shape = shape_of(options.model) if options.model else load_config(resolve(config.model.path or "."))
    mesh = make_mesh(config.mesh, jax.devices()[: options.devices])
    step = plan(config, shape, mesh, prompt=options.prompt, response=options.response)
    print(report(step, config, options.device))
    return 0
