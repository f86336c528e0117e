"""What a step takes on devices that are not here: --config=FILE.py[:ARG] --devices=64 --device=h200 [--config.x=y ...].

Compiles the step for simulated devices, without the weights and the data, and prints the memory of a device, the
operations, the bytes sent and the time that a step may take.
"""

import sys

import jax

from prefalign_jax import cli
from prefalign_jax.cost.plan import CHIPS, SHAPES, plan, report, shape_of
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.options import choose
from prefalign_jax.sharding import make_mesh
from prefalign_jax.types import UserError


def main() -> int:
    """Reads the command line; what begins with --config is the experiment's."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--devices", type=int, required=True, help="how many")
    parser.add_argument("--device", required=True, help=f"of which kind: {', '.join(CHIPS)}")
    parser.add_argument("--model", help=f"shape, in place of config.model.path: {', '.join(SHAPES)}")
    parser.add_argument("--prompt", type=int, help="tokens of every prompt; half of max_length")
    parser.add_argument("--response", type=int, help="tokens of every response; half of max_length")
    options, words = parser.parse_known_args()
    choose("device", options.device, CHIPS)
    if options.devices < 1:
        raise UserError(f"--devices={options.devices} must be at least 1")
    config = cli.read_config(words)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    shape = shape_of(options.model) if options.model else load_config(resolve(config.model.path or "."))
    mesh = make_mesh(config.mesh, jax.devices()[: options.devices])
    found = plan(config, shape, mesh, prompt=options.prompt, response=options.response)
    print(report(found, config, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
