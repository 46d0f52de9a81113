"""Imports point one way, and heavy or optional packages are imported in one module each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "evaclip"
LAYERS = [
    {
        "errors",
        "files",
        "config",
        "config_file",
        "data.order",
        "optim.schedule",
        "models.registry",
        "checkpoint_names",
        "metrics",
        "history",
        "followed",
        "wandb_id",
        "logs",
        "heartbeat",
        "lock",
        "cluster",
    },
    {"models", "loss", "optim", "data", "meter"},
    {
        "accumulation",
        "anomalies",
        "distributed",
        "engine",
        "freezing",
        "memory",
        "node_meter",
        "pace",
        "profiler",
        "trial",
    },
    {
        "alerts",
        "changes",
        "features",
        "checkpoint",
        "checkpoint_writer",
        "preemption",
        "progress",
        "tracking",
        "sources",
        "starting_weights",
        "weights",
    },
    {
        "api",
        "run",
        "accounting",
        "train",
        "preflight",
        "cluster.rank",
        "evaluation",
        "listing",
        "inspection",
        "contact_sheet",
        "picture",
        "status",
        "plot",
        "embed",
        "labelled",
        "classifier",
        "finetune",
        "cli",
        "__main__",
    },
]
ONLY_IN = {
    "deepspeed": {"engine.deepspeed_engine"},
    "wandb": {"tracking"},
    "psutil": {"node_meter"},
    "webdataset": {"data.tar"},
    "fsspec": {"data.storage"},
    "tokenizers": {"data.file_tokenizer"},
    "pyarrow": {"features"},
    "flash_attn": {"models.attention"},
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__",):
            yield name, path


def imports(path):
    """Names imported at run time, wherever in the file; not those for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for statement in test.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name):
    for number, members in enumerate(LAYERS):
        if name in members:
            return number
    parent = name.rpartition(".")[0]
    assert parent, f"{name} stands in no layer: say in LAYERS where it belongs"
    return layer(parent)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_downwards(name, path):
    known = {other for other, _ in modules()}
    own = layer(name)
    for imported in imports(path):
        target = imported.removeprefix("evaclip.")
        if imported.startswith("evaclip.") and target in known:
            assert layer(target) <= own, f"{name} imports {target} from above"


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_in_one_module(package):
    users = {name for name, path in modules() if any(i.split(".")[0] == package for i in imports(path))}
    if package == "flash_attn":  # optional: imported by name
        users = {name for name, path in modules() if '_optional("flash_attn")' in path.read_text()}
    assert users == ONLY_IN[package]


def test_launchers_need_no_more_than_the_documents_say():
    """docs/cluster.md: they run outside of the container that the ranks run in."""
    wanted = "evaclip.cli, evaclip.cluster.supervisor, evaclip.cluster.node, evaclip.cluster.machines"
    code = f"import sys; before = {{*sys.modules}}; import {wanted}; print(*({{*sys.modules}} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    of_pydantic = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    known = {"evaclip", *of_pydantic, "yaml", "tqdm", "xxhash", "cython_runtime"}
    assert {name for name in found if not name.startswith("_")} == known & found


def test_configuration_and_order_do_not_import_torch():
    wanted = (
        "evaclip.config_file, evaclip.data.order, evaclip.optim.schedule, evaclip.cli, evaclip.metrics, evaclip.history"
    )
    code = f"import sys, {wanted}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
