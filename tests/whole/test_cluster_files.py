"""The files of configs/cluster say what their pages say, in words that the command line
and the engines understand."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml
from support.paths import ROOT

from cli import main
from pipeline.runtime import engine

FILES, PAGES = ROOT / "configs" / "cluster", ROOT / "pipeline" / "labelling" / "engines"
JOB = yaml.safe_load((FILES / "kubernetes.yaml").read_text())
SKY = yaml.safe_load((FILES / "skypilot.yaml").read_text())


def words_of(text: str) -> list[str]:
    """Return the words of the first generate-labels command in a text, in the form that
    all files share: no folders of a cluster, a recipe by its name."""
    line = re.search(r"generate-labels .*", re.sub(r"\\\n\s*", "", text))
    assert line
    words = shlex.split(line[0].replace("=", " ").replace("/shared/", ""))
    return [re.sub(r"configs/(\w+)\.yaml", r"\1", word) for word in words]


def kubernetes_words() -> list[str]:
    (container,) = JOB["spec"]["template"]["spec"]["containers"]
    return words_of(" ".join([*container["command"], *container["args"]]))


COMMANDS = {
    "kubernetes": kubernetes_words(),
    "skypilot": words_of(SKY["run"]),
    "slurm": words_of((FILES / "slurm.sh").read_text()),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_runs_the_command_of_its_page(name):
    assert COMMANDS[name] == words_of((PAGES / f"{name}.md").read_text())
    known = {o for p in main.commands["generate-labels"].params for o in p.opts}
    assert {word for word in COMMANDS[name] if word.startswith("--")} <= known


def test_kubernetes_starts_a_lost_worker_again_and_tells_it_who_it_is():
    spec, pod = JOB["spec"], JOB["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    assert spec["backoffLimitPerIndex"] and pod["restartPolicy"] == "Never"  # they go together
    names = {one["name"]: one for one in container["env"]}
    uid = names[engine.JOB]["valueFrom"]["fieldRef"]["fieldPath"]
    assert uid == "metadata.labels['batch.kubernetes.io/controller-uid']"
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}
    failing = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"][1:]]
    assert [rule["containerName"] for rule in failing] == [container["name"]]


def test_the_script_for_slurm_is_bash_and_is_queued_again():
    script = FILES / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    options = re.findall(r"^#SBATCH (--[\w-]+)", script.read_text(), re.M)
    assert {"--array", "--gpus", "--requeue", "--signal"} <= set(options)
    # Behind the first command SLURM reads no options.
    assert script.read_text().rindex("#SBATCH") < script.read_text().index("\nexec ")


def test_the_task_for_skypilot_runs_a_process_for_each_gpu():
    assert "$SKYPILOT_NUM_GPUS_PER_NODE" in SKY["run"] and SKY["num_nodes"] > 1
    assert SKY["resources"]["use_spot"]
