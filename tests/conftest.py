"""Settings that must precede the first import of jax, and fixtures that several test files use."""

import gc
import os
import pathlib
import platform
import subprocess
import sys
import types

# Compiled programs are kept between runs and shared by xdist's workers. One directory a machine: a program compiled for
# one CPU may not run on another. The size limit is there because jax locks the directory only if it has one.
_cache = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    / "prefalign_jax"
    / "tests"
    / platform.node()
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ["XDG_CACHE_HOME"] = str(_cache / "home")  # what runs keep for others is the tests' own
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 1024**3))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] + [B, 1] is more often a slip than meant


def known(flags: list[str]) -> list[str]:
    """The flags that the installed XLA knows. It ends the process at any other, so each is tried in one of its own."""

    def start(*flags: str) -> bool:
        command = [sys.executable, "-c", "import jax; jax.local_devices()"]
        return not subprocess.run(
            command, env={**os.environ, "XLA_FLAGS": " ".join(flags)}, capture_output=True
        ).returncode

    return flags if start(*flags) else [flag for flag in flags if start(flag)]


# A test's programs take longer to compile than to run. Some tests start scripts as a user would, without the devices.
FAST_TO_COMPILE = " ".join(
    known(
        [
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
)
_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_TO_COMPILE}"
os.environ["XLA_FLAGS"] = _flags.strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

# Where CI is set the examples are always the same ones; elsewhere every run tries new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# What made the reference numbers needs PyTorch and is no test.
collect_ignore = ["goldens"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "Human: How do I make a cup of tea? Assistant: Boil the water, add the leaves, wait three minutes.",
    "The policy should prefer the chosen answer to the rejected one.",
    "Counting: 0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90 100.",
    "Is the sky blue? Yes, the sky is blue because the air scatters blue light more than red light.",
    "I'm sorry, but I can't help with that. What else would you like to know?",
)


# Two tiers: what is marked `everything` runs with --everything alone.


def longer(*values, **options):
    """One case of many that is of the longer tier."""
    return pytest.param(*values, marks=pytest.mark.everything, **options)


def pytest_addoption(parser):
    parser.addoption("--everything", action="store_true", help="also run the tests that only take longer")


# Files that take longest, first: so no worker begins one of them when the others are done.
LONGEST = "train members processes together benchmark notebooks sharding recipes gpu sweep averages quickstart".split()
LONGEST += "train_step losses generate hf_io group_losses face shared logps kept lora on_policy checkpoint".split()


def pytest_collection_modifyitems(config, items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.getoption("everything"):
        return
    longer = [item for item in items if item.get_closest_marker("everything")]
    config.hook.pytest_deselected(items=longer)
    items[:] = [item for item in items if item not in longer]
    if hasattr(config, "workeroutput"):
        config.workeroutput["longer"] = len(longer)


def pytest_collection_finish():
    """What is loaded by now stays; the collector need not look at it again, and less often at what tracing leaves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Counts what xdist's workers have left out, each the same, in the last line."""
    if node.gateway.id == "gw0":
        count = getattr(node, "workeroutput", {}).get("longer", 0)
        node.config.hook.pytest_deselected(items=[types.SimpleNamespace()] * count)


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Lets compiled programs go after a file once the process is large: the whole suite compiles gigabytes of them."""
    yield
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return
    if pages * os.sysconf("SC_PAGE_SIZE") > 2.5e9:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer of 384 tokens with ChatML; any text survives it. Saved in `name_or_path`."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=4096,
    )
    directory = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save_pretrained(directory)
    # Loaded back, so that a test sees what a user's directory would give.
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def light_runs():
    """Tiny runs without what takes longest in them: curves.png, and a program for the batches that would fit closer."""
    from prefalign_jax.data import pipeline

    choose = pipeline.choose_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefalign_jax.pages.plots.plot_curves", lambda workdir: None)
        patch.setattr(pipeline, "choose_shapes", lambda *args, **kwargs: choose(*args, **kwargs)[-2:])
        yield


@pytest.fixture
def launch_leaves_no_trace(monkeypatch, tmp_path):
    """Undoes what a command leaves in the process: absl's verbosity and the experiment's module."""
    verbosity = logging.get_verbosity()
    monkeypatch.chdir(tmp_path)
    yield
    logging.set_verbosity(verbosity)
    sys.modules.pop("experiment", None)
