"""The recipes for clusters, with stand-ins for what they start: what that is given, and what its exit status does."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

from launch import kubernetes
from prefalign_jax.exits import status_of

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
RUN = ["--config=dpo:model=a b,data=d", "--workdir=/runs/one", "--config.loss.name=0.8*dpo + 0.2*sft"]


@pytest.fixture
def cluster(tmp_path):
    """cluster(script, *arguments, statuses) -> (status, [words of each command that the script started])."""
    log, left = tmp_path / "log", tmp_path / "left"
    fake = f"""#!/bin/bash
printf '%s\\0' "${{0##*/}}" "$@" >> {log}; echo >> {log}
case $0 in */scontrol) exit 0;; esac
read -r status < {left}; sed -i 1d {left}; exit "$status"
"""
    for name in ("prefalign", "srun", "scontrol", "gcloud"):
        (tmp_path / name).write_text(fake)
        (tmp_path / name).chmod(0o755)

    def run(script, *arguments, statuses):
        left.write_text("\n".join(map(str, statuses)) + "\n")
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", LAUNCH / script, *arguments], env=env, timeout=60)
        return done.returncode, [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return run


def test_on_one_host_a_run_that_was_told_to_stop_is_started_again(cluster):
    assert cluster("single_host.sh", *RUN, statuses=[143, 143, 0]) == (0, [["prefalign", "train", *RUN]] * 3)


@pytest.mark.parametrize(("script", "first"), [("single_host.sh", []), ("tpu_pod.sh", ["name", "zone"])])
def test_a_mistake_is_not_tried_again(cluster, script, first):
    status, started = cluster(script, *first, *RUN, statuses=[2])
    assert (status, len(started)) == (2, 1)


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_slurm_queues_a_job_again_that_was_told_to_stop(cluster, status):
    again = [["scontrol", "requeue", "7"]] if status == 143 else []
    assert cluster("slurm.sh", *RUN, statuses=[status]) == (status, [["srun", "prefalign", "train", *RUN], *again])


def test_a_tpu_slice_gets_the_words_as_they_were_typed(cluster):
    status, started = cluster("tpu_pod.sh", "slice", "zone", *RUN, statuses=[143, 0])
    assert status == 0 and len(started) == 2
    (line,) = (word.removeprefix("--command=") for word in started[0] if word.startswith("--command="))
    shell = line.partition(" && ")[2].replace("python scripts/train.py", "printf '%s\\n'")
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["--processes=auto", *RUN]


# Kubernetes

WORDS = [*RUN, "--image=registry:5000/prefalign@sha256:0", "--claim=on"]


def test_kubernetes_runs_the_experiment_on_as_many_pods(capsys):
    assert kubernetes.main([*WORDS, "--pods=3", "--gpus=4", "--config.mesh.fsdp=-1"]) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    assert service["metadata"]["name"] == service["spec"]["selector"]["job-name"] == job["metadata"]["name"] == "dpo"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry:5000/prefalign@sha256:0"
    assert container["args"] == ["train", *RUN, "--config.mesh.fsdp=-1"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env["JAX_NUM_PROCESSES"] == "3" and env["JAX_COORDINATOR_ADDRESS"] == "dpo-0.dpo:8476"
    assert pod["subdomain"] == "dpo" and pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "on"}
    statuses = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]}
    assert statuses == {"FailJob": [2], "Ignore": [143]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workdir=/tmp/x"], "write a directory below /runs"),
        (["--pods=0"], "must be at least 1"),
        (["--name=Zephyr_7B"], "small letters"),
        (["--config.loss.betta=1"], "loss.beta"),
        (["--imag=x"], "--image"),
    ],
)
def test_a_mistake_is_said_before_the_cluster_sees_it(words, says, capsys):
    assert status_of(lambda: kubernetes.main([*WORDS, *words])) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out


def test_the_image_has_what_the_recipe_starts():
    """What each copies is in the repository, and the arguments that the comment passes are declared."""
    text = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["prefalign"]' in text
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= set(re.findall(r"^ARG (\w+)=", text, re.MULTILINE))
