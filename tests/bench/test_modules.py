"""Benchmarks that are modules of their own: a usage error is one line and exit code 2."""

import runpy
import sys

import pytest

MODULES = {
    "cpu_pairs": ["--before", "/nosuch"],
    "dry_run_table": ["table.json", "--only", "/nosuch"],
    "form_check": ["/nosuch", "triton"],
    "gpu_check": ["--stage", "/nosuch", "--out", "results"],
    "parallel_model": ["--link", "/nosuch"],
}


@pytest.mark.parametrize("module", MODULES)
def test_a_bad_value_is_named_in_one_line(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *MODULES[module]])
    monkeypatch.delitem(sys.modules, f"inferix.bench.{module}", raising=False)  # runpy warns of a module that is loaded
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"inferix.bench.{module}", run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ") and "/nosuch" in line
