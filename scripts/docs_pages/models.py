"""The table of docs/models.md, measured against transformers: python scripts/models_page.py [WORD ...]

Runs tests/test_families_parity.py, which needs the parity extra, and puts the deviations that it saw into the page:
of all cases, or of those whose names have one of the words.
"""

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from prefalign_jax.tables import markdown
from prefalign_jax.types import UserError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: scripts/models_page.py -->", "<!-- end of families -->"
# model_type -> (whose models these are, what sets them apart and is compared).
NAMES = {
    "llama": ("Llama 2 and 3, SmolLM 1 and 2", "rotations: plain, linear, llama3, yarn, dynamic; biases"),
    "seed_oss": ("Seed-OSS", "biases of q, k, v"),
    "mistral": ("Mistral 7B", "sliding window"),
    "ministral": ("Ministral 8B", "windows in some layers"),
    "ministral3": ("Ministral 3", "queries that grow beyond the original context"),
    "mixtral": ("Mixtral", "mixture of experts, sliding window"),
    "qwen2": ("Qwen 2 and 2.5", "biases of q, k, v; windows in some layers"),
    "qwen3": ("Qwen 3", "norms of q and k"),
    "qwen3_moe": ("Qwen 3 MoE", "mixture of experts, norms of q and k"),
    "qwen3_5_text": ("Qwen 3.5, dense", "a gated delta rule in three layers of four, gated attention in the fourth"),
    "gpt_oss": (
        "gpt-oss",
        "mixture of experts with biases and a clamped gate, attention sinks, windows in every other layer",
    ),
    "smollm3": ("SmolLM 3", "layers without rotation"),
    "gemma": ("Gemma 1", "scaled embedding, norms that count from 1"),
    "gemma2": ("Gemma 2", "soft-caps of scores and logits, norms before and after, windows in every other layer"),
    "gemma3_text": ("Gemma 3, text", "local and global layers with rotations of their own, norms of q and k"),
    "olmo2": ("OLMo 2", "norms after, norms over the width of q and k"),
    "olmo3": ("OLMo 3", "norms after, windows in most layers, whose rotation is not scaled"),
    "granite": ("Granite 3", "multipliers of embedding, residuals, scores and logits"),
    "granitemoehybrid": ("Granite 4, dense", "the same, fused projections"),
    "glm": ("GLM-4", "neighbours rotated together, fused projections, biases of q, k, v"),
    "glm4": ("GLM-4 0414", "the same, norms before and after, part of each head rotated"),
    "exaone4": ("EXAONE 4", "norms after, norms of q and k, rotation in layers with a window only"),
    "cohere2": (
        "Command R7B and A",
        "parallel attention and MLP, centred norms, no rotation in layers without a window",
    ),
    "phi": ("Phi 1, 1.5 and 2", "parallel attention and MLP, biases, a biased head, part of each head rotated"),
    "phi3": ("Phi 3 and 4", "fused projections, longrope, part of each head rotated"),
    "starcoder2": ("StarCoder 2", "layer norms, biases, sliding window"),
    "gpt2": ("GPT-2", "learned positions, fused projections"),
    "gpt_neox": ("GPT-NeoX, Pythia", "parallel or sequential, fused projections interleaved by head"),
    "opt": ("OPT", "learned positions from the third row on, ReLU"),
}
COLUMNS = ("logits", "logps", "gradient", "export", "rewards")


def measure(words: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
    """{case: {column: largest deviation}} of a run of the parity tests, of the cases with one of the words."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_families_parity.py", f"--junitxml={report}"]
        command += ["--everything", "-o", "junit_family=xunit1"]  # which keeps properties
        command += ["-k", " or ".join(words)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise UserError("the parity tests failed: the page is left as it is")
        cases = defaultdict(dict)
        for test in ElementTree.parse(report).getroot().iter("testcase"):
            case = re.search(r"\[(.*)\]", test.get("name", ""))
            for entry in test.iter("property"):
                cases[case[1]][entry.get("name")] = float(entry.get("value"))
    if not cases:
        raise UserError('nothing was measured: install the parity extra, pip install -e ".[parity]"')
    return cases


def table(cases: dict[str, dict[str, float]]) -> str:
    """The rows, a family's variants beneath it."""
    rows = []
    for family, (models, features) in NAMES.items():
        for case in sorted(case for case in cases if case.split()[0] == family):
            name = f"`{family}`" if case == family else f"`{family}`, {case.partition(' ')[2]}"
            about = (models, features) if case == family else ("", "")
            values = [f"{cases[case][column]:.1e}" if column in cases[case] else "-" for column in COLUMNS]
            rows.append((name, *about, *values))
    return markdown(("model_type", "models", "besides what Llama has", *COLUMNS), rows)


def read(rows: str) -> dict[str, dict[str, float]]:
    """The inverse of `table`."""
    cases = {}
    for row in rows.splitlines():
        if name := re.match(r"\| `(\w+)`(?:, ([\w ]+))? \|", row):
            values = zip(COLUMNS, row.split(" | ")[-len(COLUMNS) :], strict=True)
            numbers = {column: float(value.strip(" |")) for column, value in values if value.strip(" |") != "-"}
            cases[" ".join(filter(None, name.groups()))] = numbers
    return cases


def write(*words: str) -> None:
    """Rewrites what stands between the marks; with words only the rows of the cases that have one in their names."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    cases = (read(old) if words else {}) | measure(words)
    PAGE.write_text(f"{before}{BEGIN}\n{table(cases)}\n{END}{after}", encoding="utf-8")
