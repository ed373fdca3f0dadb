"""Runs as jobs of a Ray cluster, through its Jobs API (HTTP): submitted, listed, followed, stopped.

A job's id is its run's name (the last part of run.dir) and a number. What the cluster does with it: driver.py.
"""

import asyncio
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import requests
from ray.job_submission import JobDetails, JobSubmissionClient

from nsa_dist.auto import has_auto
from nsa_dist.config import Config, ConfigError
from nsa_dist.launch.cluster import noted_cluster
from nsa_dist.launch.package import CHECKED, WAITING, absolute, in_words, pack

_ERROR = "nsa-dist: error: "  # begins a job's line that says why it has failed
# A run ends after its step, with a checkpoint; Ray kills what takes longer.
_STOP_S = 900
_ANSWER_S = 10.0  # for the cluster to answer
_CHECK_S = 180.0  # for a job to say that it has begun
_LOOK_S = 0.3


@dataclass(frozen=True)
class Job:
    """A job that nsa-dist has submitted. Times in s since 1970, 0 where it isn't so far."""

    id: str
    run: str
    run_dir: str
    state: str  # PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    started: float
    ended: float
    exit_status: int | None
    message: str  # Ray's

    @property
    def over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")


class Jobs:
    """The jobs of the cluster at `address` (http://HOST:PORT; None: the one that `cluster up` started here).

    Raises ConfigError where no cluster answers there, or doesn't accept the token.
    """

    def __init__(self, address: str | None) -> None:
        noted = noted_cluster()
        if address is None and noted is None:
            raise ConfigError(
                "--address: no cluster of yours is up here; must be http://HOST:8265, or cluster up first"
            )
        address = address or (noted.dashboard if noted else "")
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        if not re.fullmatch(r"https?://[^/]+", self.address):
            raise ConfigError(f"--address {address}: must be http://HOST:PORT or https://HOST:PORT")
        self.on_this_machine = noted is not None and noted.dashboard == self.address
        token = noted.token if noted and self.on_this_machine else _token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.ray_version = self._get("/api/version")["ray_version"]
        self._client = JobSubmissionClient(self.address, headers=self._headers)
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)  # it tells of each upload

    def asks_for_token(self) -> bool:
        """Whether the cluster turns away who brings none."""
        return requests.get(f"{self.address}/api/jobs/", timeout=_ANSWER_S).status_code in (401, 403)

    def every(self) -> list[Job]:
        """The jobs that were submitted by nsa-dist, the oldest first."""
        jobs = [_job(details) for details in self._client.list_jobs()]
        return sorted((job for job in jobs if job), key=lambda job: job.started)

    def find(self, name: str) -> Job:
        """The job of that id, else the newest of that run. Raises ConfigError where there is none."""
        jobs = self.every()
        for job in reversed(jobs):
            if name in (job.id, job.run):
                return job
        known = ", ".join(sorted({job.run for job in jobs})) or "none"
        raise ConfigError(f"run '{name}': no such run or job at {self.address}; there are: {known}")

    def facts(self, job: Job) -> dict[str, Any]:
        """What is to be known of a job, for `status` and `list`."""
        last = "" if job.state == "PENDING" else _last_line(self.logs(job))
        return {
            "run": job.run,
            "job": job.id,
            "state": job.state,
            "run_dir": job.run_dir,
            "seconds": round((job.ended if job.over else time.time()) - job.started, 1) if job.started else 0.0,
            "exit_status": job.exit_status,
            "last_line": last or (job.message if job.over else ""),
        }

    def why(self, job: Job) -> str:
        """Its last words, or Ray's about it."""
        return _last_line(self.logs(job)) or _first_line(job.message)

    def logs(self, job: Job) -> str:
        """What the job has said up to now."""
        return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job) -> Iterator[str]:
        """What the job says, as it comes, until its end."""
        with asyncio.Runner() as runner:
            parts = self._client.tail_job_logs(job.id)
            while True:
                try:
                    yield runner.run(anext(parts))  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return

    def stop(self, job: Job, wait_s: float = _STOP_S + 60) -> Job:
        """Asks the job to end, with a checkpoint; the job once it has ended."""
        self._client.stop_job(job.id)
        return self._wait(job.id, lambda found: found.over, wait_s)

    def submit(self, config: Config, wait: bool, say: Callable[[str], None]) -> Job:
        """Sends the job and returns when the cluster has checked it; say gets what is sent and what was found.

        Raises ConfigError where it can't run there: nothing has been started then.
        """
        if self.on_this_machine:
            config = absolute(config)
        run = Path(config.run.dir).name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run):
            raise ConfigError(
                f"run.dir={config.run.dir}: its last part names the run; must be letters, digits, . _ -"
            )
        self._check_version()
        number = self._check_unused(run, config.run.dir)
        if not wait:
            self._check_room(config)
        with tempfile.TemporaryDirectory(prefix="nsa-dist-") as folder:
            sent = pack(config, wait, Path(folder))
            whole = ", ".join(f"{name} ({in_words(size)})" for name, size in sent)
            say(f"sends to {self.address}: {whole}")
            if not self.asks_for_token():
                say("warning: this cluster asks for no token; who reaches its port can run code there")
            try:
                job = self._client.submit_job(
                    entrypoint="exec python -m nsa_dist job",
                    submission_id=f"{run}-{number}",
                    metadata={"run": run, "run_dir": config.run.dir},
                    runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}},
                )
            except RuntimeError as error:
                raise ConfigError(f"run {run}: not taken by {self.address} ({_first_line(error)})") from None
        return self._checked(job, say)

    def _checked(self, job: str, say: Callable[[str], None]) -> Job:
        """The job, once it has said that it can run. Raises ConfigError with its words where it can't."""

        def said(found: Job) -> list[str]:
            if found.state == "PENDING":
                return []
            lines = self._client.get_job_logs(job).splitlines()
            return [line for line in lines if line.startswith((CHECKED, WAITING, _ERROR))]

        found = self._wait(job, lambda found: found.over or bool(said(found)), _CHECK_S)
        lines = said(found)
        good = [line for line in lines if not line.startswith(_ERROR)]
        if found.state == "FAILED" and not good:
            raise ConfigError(lines[-1].removeprefix(_ERROR) if lines else f"job {job}: {self.why(found)}")
        for line in good:
            say(line)
        return found

    def _wait(self, job: str, until: Callable[[Job], bool], seconds: float) -> Job:
        end = time.monotonic() + seconds
        while True:
            found = _job(self._client.get_job_info(job))
            assert found, f"{job} is a job of nsa-dist's"
            if until(found) or time.monotonic() > end:
                return found
            time.sleep(_LOOK_S)

    def _check_version(self) -> None:
        if self.ray_version != ray.__version__:
            raise ConfigError(
                f"--address {self.address}: Ray {self.ray_version} there, {ray.__version__} here; must be equal"
            )

    def _check_unused(self, run: str, run_dir: str) -> int:
        """The number of the run's next job."""
        jobs = [job for job in self.every() if job.run == run]
        for job in jobs:
            if not job.over:
                raise ConfigError(
                    f"run.dir={run_dir}: run {run} is in use by job {job.id} ({job.state}); "
                    f"must be another name, or nsa-dist stop {run} first"
                )
        return 1 + max((int(job.id.rpartition("-")[2]) for job in jobs), default=0)

    def _check_room(self, config: Config) -> None:
        """Raises ConfigError where the cluster is too small, free or not."""
        nodes = self._get("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        there = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
        gpus = sum(int(node.get("GPU", 0)) for node in there)
        device = config.launch.device if config.launch.device != "auto" else "cuda" if gpus else "cpu"
        unit, places = ("GPU", gpus) if device == "cuda" else ("CPU", sum(int(node.get("CPU", 0)) for node in there))
        parallel = config.parallel
        if has_auto(config):
            parallel = replace(parallel, dp=1 if parallel.dp == "auto" else parallel.dp)
            parallel = replace(parallel, cp=1 if parallel.cp == "auto" else parallel.cp)
        wanted = parallel.dp * parallel.cp
        if wanted > places:
            numbers = f"parallel.dp={config.parallel.dp} parallel.cp={config.parallel.cp}"
            raise ConfigError(
                f"{numbers}: {wanted} ranks need a {unit} each, the cluster has {places} on {len(there)} nodes; "
                f"must be at most {places}, or --wait for more nodes"
            )

    def _get(self, path: str) -> Any:
        try:
            answer = requests.get(self.address + path, headers=self._headers, timeout=_ANSWER_S)
        except requests.RequestException:
            raise ConfigError(f"--address {self.address}: no Ray cluster answers there") from None
        if answer.status_code in (401, 403):
            what = "a wrong token" if self._headers else "no token"
            raise ConfigError(
                f"--address {self.address}: {what} was given; must be that cluster's, in RAY_AUTH_TOKEN, in the file "
                "that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
            )
        try:
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, json.JSONDecodeError):
            raise ConfigError(f"--address {self.address}: what answers there is no Ray cluster") from None


def _job(details: JobDetails) -> Job | None:
    """None for a job that somebody submitted otherwise."""
    metadata = details.metadata or {}
    if not details.submission_id or not {"run", "run_dir"} <= metadata.keys():
        return None
    started, ended = ((time_ms or 0) / 1000 for time_ms in (details.start_time, details.end_time))
    return Job(
        details.submission_id,
        metadata["run"],
        metadata["run_dir"],
        str(details.status.value),
        started,
        ended,
        details.driver_exit_code,
        details.message or "",
    )


def _token() -> str:
    """The token for a cluster elsewhere, from where Ray looks for it; "" where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
