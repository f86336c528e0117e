"""Trackers: services that get a run's metrics and its config, each through its own client.

A run has one run in each tracker; the file KEPT in its directory has their ids. A client is imported when a run asks
for it.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefalign_jax.files import read_json, write_json
from prefalign_jax.processes import note
from prefalign_jax.types import UserError, one_line

KEPT = "trackers.json"  # in the workdir: {tracker: id of the run there}
PROJECT = "prefalign_jax"  # which runs are filed under, where the tracker's own variable names no other
TENSORBOARD = "tensorboard"  # metrics.py writes its files
WITHOUT = "the run goes on without it, and its own files have all metrics"
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")  # of an address


class About(NamedTuple):
    """What a tracker is told of a run.

    Attributes:
      workdir: of the run; its name is the run's, and the name of what it lies in that of the group.
      params: the config with dotted names.
    """

    workdir: Path
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.workdir.resolve().name

    @property
    def group(self) -> str:
        """Of runs that lie side by side, such as those of a sweep."""
        return self.workdir.resolve().parent.name


class Client(Protocol):
    """A run in a tracker. Made from (about, None), or from (about, id) to go on with one that is there.

    Attributes:
      id: of the run.
      where: to find it, for the person watching.
    """

    id: str
    where: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the metrics of a step, after those of the steps before it."""

    def finish(self, failed: bool) -> None:
        """Waits until what was logged is where it belongs, and closes the run."""


class WandB:
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables hold."""

    def __init__(self, about: About, run: str | None):
        import wandb

        self.id = run or secrets.token_hex(4)
        # The command line is part of wandb's metadata, and may hold a secret. What the terminal shows is not recorded.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_meta=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        names = dict(id=self.id, name=about.name, group=about.group)
        place = os.environ.get("WANDB_DIR", str(about.workdir))
        self.run = wandb.init(
            project=project, dir=place, resume="allow", reinit="create_new", settings=settings, **names
        )
        self.run.config.update(dict(about.params), allow_val_change=True)
        self.where = f"offline, for `wandb sync {Path(self.run.dir).parent}`" if self.run.offline else self.run.url

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Client`."""
        self.run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        """See `Client`."""
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, on this machine unless its variables name a Space or a server."""

    def __init__(self, about: About, run: str | None):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # A context of its own: in one context trackio ends a run where another begins.
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = contextvars.Context().run(
                trackio.init,
                project=project,
                name=about.name,
                group=about.group,
                config=dict(about.params),
                resume="must" if run else "never",
                auto_log_cpu=False,
                embed=False,
            )
        self.id = self.run.id
        if run not in (None, self.id):  # it looks runs up by name, and another directory may have that name too
            self.finish(failed=False)
            raise LookupError(f"another run is called {about.name} by now")
        self.where = f"`trackio show --project {project}`"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Client`."""
        self.run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        """See `Client`."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, as an experiment MLFLOW_EXPERIMENT_NAME."""

    AT_ONCE = 100  # parameters
    LONGEST = 6000  # characters of a parameter

    def __init__(self, about: About, run: str | None):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if run:
            self.client.update_run(run, status="RUNNING")
            known = self.client.get_run(run).data.params
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self.client.get_experiment_by_name(name)
            at = experiment.experiment_id if experiment else self.client.create_experiment(name)
            run, known = self.client.create_run(at, run_name=about.name, tags={"group": about.group}).info.run_id, {}
        self.id, self.where = run, f"{_public(self.client.tracking_uri)}, run {run}"
        from mlflow.entities import Param

        values = {_mlflow_name(name): str(value)[: self.LONGEST] for name, value in about.params.items()}
        # A parameter cannot change in MLflow. What changes when a run is resumed comes under a name of its own.
        params = [Param(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(params), self.AT_ONCE):
            self.client.log_batch(run, params=params[first : first + self.AT_ONCE])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Client`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(_mlflow_name(name), x, now, step) for name, x in numbers.items()])

    def finish(self, failed: bool) -> None:
        """See `Client`."""
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _mlflow_name(name: str) -> str:
    """A name without the signs that MLflow takes in none, such as the brackets of a mixture of losses."""
    return re.sub(r"[^\w\-. :/]", "_", name)


TRACKERS: dict[str, Callable[[About, str | None], Client]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def check_installed(names: Sequence[str]) -> None:
    """Refuses trackers whose client is not there.

    Args:
      names: keys of TRACKERS, or tensorboard.

    Raises:
      UserError: with what installs it.
    """
    for name in names:
        if importlib.util.find_spec("tensorboardX" if name == TENSORBOARD else name) is None:
            raise UserError(f"log_to={name} needs a package that is not installed: pip install 'prefalign_jax[{name}]'")


class Trackers:
    """The runs that a run has in its trackers. A thread sends what is written; one that fails is left out from then on.

    Args:
      clients: by name.
      sent: tracker -> file of metrics -> the last of its steps that the tracker has; {} for a run that is new there.
      kept: the file KEPT, which forgets the run of a tracker that fails: a later run begins another, with all metrics.
    """

    def __init__(self, clients: Mapping[str, Client], sent: Mapping[str, dict[str, int]], kept: Path):
        self.clients, self.sent, self.kept = dict(clients), sent, kept
        self.pool = ThreadPoolExecutor(1, "trackers")
        write_json(kept, {name: client.id for name, client in clients.items()})

    def write(self, file: str, step: int, numbers: Mapping[str, Any]) -> None:
        """Sends the metrics of a step to those that do not have them; returns before they are sent.

        Args:
          file: which they stand in, metrics or eval.
          step: of the run, not below that of the call before.
          numbers: what is not finite is left out, as it is for TensorBoard.
        """
        finite = {name: x for name, x in numbers.items() if x is not None and math.isfinite(x)}

        def log(name: str, client: Client) -> None:
            if step > self.sent[name].get(file, -1):
                client.log(step, finite)
                self.sent[name][file] = step

        self.pool.submit(self._each, log)

    def close(self, failed: bool = False) -> None:
        """Waits until everything is sent.

        Args:
          failed: whether the run ends by a failure.
        """
        self.pool.submit(self._each, lambda name, client: client.finish(failed))
        self.pool.shutdown()

    def _each(self, action: Callable[[str, Client], None]) -> None:
        for name, client in [*self.clients.items()]:
            try:
                action(name, client)
            except Exception as error:  # of whatever kind: a tracker costs nobody a run
                del self.clients[name]
                write_json(self.kept, {name: client.id for name, client in self.clients.items()})
                note(f"{name}: {_said(error)}; {WITHOUT}")


def open_trackers(
    names: Sequence[str],
    about: About,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    start: int = 0,
    changed: bool = False,
) -> Trackers:
    """Begins a run in each tracker, or goes on with the one there; each gets the metrics so far that it does not have.

    A run that was killed has sent steps after its last checkpoint, which are now done again. They give the same numbers
    and are not sent twice. Where they give others, the run in the tracker would be of neither, so another begins.

    Args:
      names: keys of TRACKERS.
      about: the run.
      rows: file of metrics -> all its rows, those of steps that are done again included.
      start: the step that the run goes on from.
      changed: whether it goes on with other values than before.

    Raises:
      UserError: a tracker cannot begin, at step 0. Later the run goes on without it.
    """
    about = about._replace(params={name: _public(x) for name, x in about.params.items() if x is not None})
    ids = read_json(about.workdir / KEPT, {"*": "a string"}, missing={})
    last = {file: known[-1]["step"] for file, known in rows.items() if known}
    again = start == 0 or (changed and max(last.values(), default=0) > start)
    clients, sent = {}, {}
    for name in names:
        run = None if again else ids.get(name)
        try:
            clients[name], goes_on = _begun(name, about, run)
        except Exception as error:
            if start == 0:
                raise UserError(f"log_to={name}: {_said(error)}; see docs/training.md, or leave it out") from error
            note(f"{name}: {_said(error)}; {WITHOUT}")
            continue
        sent[name] = {**last} if goes_on else {}
        note(f"{name}: {clients[name].where}")
    trackers = Trackers(clients, sent, about.workdir / KEPT)
    kept = [(row["step"], file, row) for file, known in rows.items() for row in known if start and row["step"] <= start]
    for step, file, row in sorted(kept, key=lambda one: (one[0], one[1] == "eval")):
        trackers.write(file, step, {name: value for name, value in row.items() if name != "step"})
    return trackers


def _begun(name: str, about: About, run: str | None) -> tuple[Client, bool]:
    """(a run in a tracker, whether it is the one that is asked for); another where that one is not there any more."""
    if run:
        try:
            return TRACKERS[name](about, run), True
        except Exception as error:
            note(f"{name}: it cannot go on with run {run} ({_said(error)}), and begins another")
    return TRACKERS[name](about, None), False


def _said(error: Exception) -> str:
    return _public(one_line(error))


def _public(value: Any) -> Any:
    """A text without the credentials of the addresses in it."""
    return _CREDENTIALS.sub("", value) if isinstance(value, str) else value
