"""`inferix plan`: its figures, its suggestions applied, its refusals, and the tables in the docs."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inferix.cli.main import app
from inferix.runtime.capacity.gpus import CARDS

DOC = Path(__file__).parents[2] / "docs" / "plan.md"


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def facts(*arguments):
    done = plan(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), done.exit_code


def test_a_plan_that_fits():
    result, code = facts("--model", "wan-1.3b", "--preset", "longlive", "--gpu", "rtx-4090")
    assert code == 0 and result["fits"] and result["sessions_that_fit"] == 1
    parts = (*result["memory"]["once"].values(), *result["memory"]["each_session"].values())
    assert sum(parts) == result["memory"]["needed"] <= result["memory"]["given"] == 24 * 10**9
    assert result["pages"] == 12 and result["longest_window"] >= result["window"] == 12
    predicted = result["predicted"]
    assert "not a measurement" in predicted["kind"] and predicted["assumed_efficiency"] == 1
    steady, work = predicted["blocks"]["steady"], result["work"]["steady"]
    assert steady["transformer_seconds"] >= work["transformer_flops"] / 165.2e12
    assert steady["fps"] == pytest.approx(12 / steady["seconds"])
    shown = plan("--preset", "longlive", "--gpu", "rtx-4090")
    assert shown.exit_code == 0
    for words in ("It fits: .*1 session", "rtx-4090", "predictions", "not measurements"):  # no floor without its caveat
        assert re.search(words, shown.stdout)


def test_sessions_and_given_ceilings():
    one, _ = facts("--preset", "longlive", "--memory", "80GB", "--tflops", "790", "--bandwidth", "4300")
    four, code = facts("--preset", "longlive", "--memory", "80GB", "--sessions", "4")
    assert code == 0 and four["predicted"] is None
    assert one["predicted"]["ceiling"] == {"tflops": 790, "bandwidth": 4300, "source": "given"}
    assert four["memory"]["needed"] - one["memory"]["needed"] == 3 * sum(one["memory"]["each_session"].values())
    assert four["sessions_that_fit"] == one["sessions_that_fit"] >= 4
    partly, _ = facts("--gpu", "h200", "--tflops", "790")
    assert partly["predicted"]["ceiling"] == {
        "tflops": 790, "bandwidth": 4800, "source": "h200, maker's figures, one given",
    }  # fmt: skip
    wide, _ = facts("--gpu", "h200", "--dtype", "float32")
    assert wide["predicted"] is None
    batches = facts("--preset", "longlive", "--gpu", "h200", "--sessions", "6")[0]["batches"]
    assert [row["batch"] for row in batches] == [1, 2, 4] and "batches" not in one
    assert batches[0]["needed"] < batches[1]["needed"] < batches[2]["needed"] and batches[0]["fps"] <= batches[2]["fps"]
    assert "6 sessions in batches" in plan("--preset", "longlive", "--memory", "80GB", "--sessions", "6").stdout


@pytest.mark.parametrize(
    "asked",
    [
        "--preset longlive --memory 16GB",
        "--preset krea --memory 24GB",
        "--preset rolling-forcing --gpu rtx-3090",
        "--preset self-forcing --memory 8GB --sessions 3 --dtype float32",
        "--model wan-5b --preset longlive2 --memory 16GB",
    ],
)
def test_suggested_options_need_the_stated_memory(asked):
    """Each suggestion, added to the options, needs the stated bytes and fits if it says so."""
    result, code = facts(*shlex.split(asked))
    assert code == 1 and result["fits"] is False and result["changes"]
    for change in result["changes"]:
        after, code = facts(*shlex.split(asked), *shlex.split(" ".join(change["options"])))
        assert after["memory"]["needed"] == change["needed"]
        assert (code == 0) == change["fits"] == after["fits"]
    shown = plan(*shlex.split(asked))
    assert shown.exit_code == 1
    assert "does not fit" in shown.stdout and "--no-text-encoder" in shown.stdout


def test_defaults_of_model_and_preset():
    assert facts("--preset", "krea")[0]["model"] == "wan-14b"
    assert facts("--model", "wan-14b")[0]["preset"] == "self-forcing"
    assert facts("--model", "tinyworld")[0]["preset"] == "tinyworld"
    result, code = facts()
    assert (result["model"], result["preset"], result["fits"], code) == ("wan-1.3b", "self-forcing", None, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "wan1.3b"], "model.*'wan1.3b'.*'wan-1.3b'"),
        (["--model", "wan-14b-i2v"], "wan-14b-i2v.*wan-14b"),
        (["--preset", "longlve"], "'longlve'.*'longlive"),
        (["--gpu", "h20"], "--gpu.*'h20'.*'h200'"),
        (["--gpu", "abacus"], "'abacus'.*rtx-4090"),
        (["--memory", "24"], "--memory.*'24'.*24GB"),
        (["--memory", "lots"], "memory.*'lots'"),
        (["--memory", "-3GB"], "memory.*'-3GB'"),
        (["--memory", "0GB"], "memory.*0"),
        (["--sessions", "0"], "sessions.*0"),
        (["--size", "833x480"], "833x480.*832x480.*848x480"),
        (["--size", "wide"], "--size.*'wide'.*832x480"),
        (["--dtype", "bf16"], "--dtype.*'bf16'.*bfloat16"),
        (["--kv-dtype", "fp4"], "--kv-dtype.*'fp4'.*'fp8'"),
        (["--kv-dtype", "fp8", "--gpu", "a100-80gb"], "--kv-dtype.*a100-80gb.*int8"),
        (["--vae", "teahv"], "--vae.*'teahv'.*'taehv'"),
        (["--preset", "krea", "--vae", "taehv"], "krea.*--vae"),
        (["--set", "local_attn_size=2"], "local_attn_size.*2.*3 frames"),
        (["--set", "local_attn_size=-1"], "--set local_attn_size=21"),
        (["--set", "local_atn_size=6"], "'local_atn_size'.*'local_attn_size'"),
        (["--tflops", "700"], "--bandwidth"),
        (["--tflops", "0", "--bandwidth", "1"], "--tflops.*0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words):
    done = plan(*arguments)
    assert done.exit_code == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and re.search(words, done.stderr)


def test_help_has_an_example_and_every_gpu():
    shown = plan("--help")
    assert shown.exit_code == 0
    assert "Example: inferix plan" in shown.stdout
    assert all(name in " ".join(shown.stdout.split()) for name in CARDS)


def test_the_tables_in_the_docs_are_what_the_command_prints():
    text = DOC.read_text("utf-8")
    for table in plan("--table").stdout.strip().split("\n\n"):
        assert table in text, "docs/plan.md is old; put what inferix plan --table prints into it"
