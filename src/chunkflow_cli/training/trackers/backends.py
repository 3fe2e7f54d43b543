"""Adapt each tracker's library. This runs in the tracker's own process, and only there the library is imported."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio",),
}
"""Distributions that each tracker needs; one of several is enough."""
MLFLOW_BATCH, MLFLOW_VALUE = 100, 6000
"""Parameters in a request and characters in their values, as MLflow's server limits them."""


@dataclass(frozen=True)
class Introduction:
    """Facts about the run that a tracker gets before the first row."""

    folder: str
    """Folder for the tracker's own files, in the folder of the run."""
    run_name: str
    project: str | None
    described: dict[str, Any]
    """Configuration, plan and environment of the run."""
    first_step: int
    id: str | None
    """The id under which the tracker knows the run already; None for a new run."""


class Tracker(Protocol):
    """A run as a tracker knows it."""

    id: str
    """The id under which the tracker continues the run later."""
    where: str
    """The place where people look at the run."""
    drops_repeated: bool
    """True if it drops its own rows from `first_step` on; others are not given a step twice."""

    def __init__(self, run: Introduction) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a row of metrics."""

    def finish(self, status: str) -> None:
        """Finish the run: `finished`, `failed` or `stopped`."""


class Wandb:
    """Weights & Biases. WANDB_MODE=offline and its other environment variables have their usual effect."""

    drops_repeated = False

    def __init__(self, run: Introduction) -> None:
        import wandb

        self.id = run.id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=_project(run, "WANDB_PROJECT"),
            name=run.run_name,
            id=self.id,
            resume="allow",
            dir=run.folder,
            config=run.described,
            allow_val_change=True,  # chunk.size and the layout may change when a run goes on
            settings=wandb.Settings(console="off", silent=True, x_stats_pid=os.getppid()),
        )
        offline = f"{self._run.settings.sync_dir} (wandb sync uploads it)"
        self.where = offline if self._run.settings.mode == "offline" else self._run.url

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MLflow:
    """An MLflow server, or whatever MLFLOW_TRACKING_URI names."""

    drops_repeated = False

    def __init__(self, run: Introduction) -> None:
        # By default, requests to a server that is down are repeated for minutes, while rows wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run.id is not None:
            known = self._client.get_run(run.id)
            self._client.update_run(run.id, status="RUNNING")
        else:
            project = _project(run, "MLFLOW_EXPERIMENT_NAME")
            experiment = self._client.get_experiment_by_name(project)
            number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
            known = self._client.create_run(number, run_name=run.run_name)
        self.id = known.info.run_id
        params = [
            Param(_mlflow_name(name), str(value)[:MLFLOW_VALUE])
            for name, value in flattened(run.described).items()
            if _mlflow_name(name) not in known.data.params  # a parameter cannot change
        ]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self.id, params=params[start : start + MLFLOW_BATCH])
        uri = self._client.tracking_uri.rstrip("/")
        is_server = uri.startswith("http")
        self.where = f"{uri}/#/experiments/{known.info.experiment_id}/runs/{self.id}" if is_server else uri

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self.id, [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        )

    def finish(self, status: str) -> None:
        self._client.set_terminated(self.id, {"finished": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


class Trackio:
    """Trackio: a local database, or the Space or server that its environment variables name."""

    drops_repeated = False

    def __init__(self, run: Introduction) -> None:
        import trackio

        # Trackio finds a run by its name, and several runs may have the same.
        self.id = run.id or f"{run.run_name}-{uuid.uuid4().hex[:8]}"
        project = _project(run, "TRACKIO_PROJECT")
        self._run = trackio.init(
            project, self.id, config=flattened(run.described), resume="allow", embed=False, auto_log_cpu=False
        )
        self.where = f"trackio show --project {project!r}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish()


class TensorBoard:
    """Event files for TensorBoard, in the folder of the run."""

    drops_repeated = True

    def __init__(self, run: Introduction) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self.id = self.where = str(Path(run.folder).parent / "tensorboard")
        self._writer = EventFileWriter(self.id)
        started = SessionLog(status=SessionLog.START)  # TensorBoard drops rows of this step and later ones
        self._writer.add_event(Event(wall_time=time.time(), step=run.first_step, session_log=started))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        rows = [self._summary.Value(tag=f"train/{name}", simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=rows)))

    def finish(self, status: str) -> None:
        self._writer.close()


BACKENDS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip


def flattened(described: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in described.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _project(run: Introduction, variable: str) -> str:
    return run.project or os.environ.get(variable) or "chunkflow"


def _mlflow_name(name: str) -> str:
    """Return a name without the characters that MLflow refuses, such as < in the name of a length bucket."""
    return re.sub(r"[^\w.\- /]", "_", name)
