# The package, with `prefalign` as the entry point. EXTRAS=cuda adds JAX for NVIDIA GPUs, whose wheels bring CUDA; the
# host has the driver and NVIDIA's container toolkit.
#   docker build -t prefalign_jax .
#   docker build -t prefalign_jax:cuda --build-arg EXTRAS=cuda .
#   docker run --gpus=all -v "$PWD/runs:/runs" prefalign_jax:cuda train --config=quickstart --workdir=/runs/quickstart
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG EXTRAS=
WORKDIR /prefalign_jax

# What it requires is a layer by itself, which a change of the code does not make again.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY prefalign_jax/__init__.py prefalign_jax/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}"

COPY . .
RUN pip install --no-cache-dir --no-deps .

ENTRYPOINT ["prefalign"]
CMD ["--help"]
