"""`inferix plan`: what it says, that its advice does what it promises, its refusals, and the tables in the docs."""

import json
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
    told, code = facts("--model", "wan-1.3b", "--preset", "longlive", "--gpu", "rtx-4090")
    assert code == 0 and told["fits"] and told["sessions_that_fit"] == 1
    parts = (*told["memory"]["once"].values(), *told["memory"]["each_session"].values())
    assert sum(parts) == told["memory"]["needed"] <= told["memory"]["given"] == 24 * 10**9
    assert told["pages"] == 12 and told["longest_window"] >= told["window"] == 12
    predicted = told["predicted"]
    assert "not a measurement" in predicted["kind"] and predicted["assumed_efficiency"] == 1
    steady, work = predicted["blocks"]["steady"], told["work"]["steady"]
    assert steady["transformer_seconds"] >= work["transformer_flops"] / 165.2e12
    assert steady["fps"] == pytest.approx(12 / steady["seconds"])
    shown = plan("--preset", "longlive", "--gpu", "rtx-4090")
    assert shown.exit_code == 0
    for said in ("It fits: 1 session", "maker's figures", "Floors are predictions", "Nothing was measured"):
        assert said in shown.stdout


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
def test_advice_does_what_it_says(asked):
    """Every change, given back as options, needs what was promised and fits where that was promised."""
    told, code = facts(*shlex.split(asked))
    assert code == 1 and told["fits"] is False and told["changes"]
    for change in told["changes"]:
        after, code = facts(*shlex.split(asked), *shlex.split(" ".join(change["options"])))
        assert after["memory"]["needed"] == change["needed"]
        assert (code == 0) == change["fits"] == after["fits"]
    shown = plan(*shlex.split(asked))
    assert shown.exit_code == 1
    assert "It does not fit" in shown.stdout and "--no-text-encoder" in shown.stdout


def test_the_model_or_the_preset_alone():
    assert facts("--preset", "krea")[0]["model"] == "wan-14b"
    assert facts("--model", "wan-14b")[0]["preset"] == "self-forcing"
    assert facts("--model", "tinyworld")[0]["preset"] == "tinyworld"
    told, code = facts()
    assert (told["model"], told["preset"], told["fits"], code) == ("wan-1.3b", "self-forcing", None, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "wan1.3b"], "did you mean 'wan-1.3b'"),
        (["--model", "wan-14b-i2v"], "not in this version"),
        (["--preset", "longlve"], "did you mean 'longlive"),
        (["--gpu", "h20"], "did you mean 'h200'"),
        (["--gpu", "abacus"], "rtx-4090"),
        (["--memory", "24"], "no unit; expected such as 24GB"),
        (["--memory", "lots"], "memory is 'lots'"),
        (["--memory", "-3GB"], "memory is '-3GB'"),
        (["--memory", "0GB"], "more than 0"),
        (["--sessions", "0"], "sessions is 0"),
        (["--size", "833x480"], "832x480 or 848x480"),
        (["--size", "wide"], "WIDTHxHEIGHT"),
        (["--dtype", "bf16"], "bfloat16"),
        (["--kv-dtype", "fp4"], "did you mean 'fp8'"),
        (["--kv-dtype", "fp8", "--gpu", "a100-80gb"], "use int8"),
        (["--vae", "teahv"], "did you mean 'taehv'"),
        (["--preset", "krea", "--vae", "taehv"], "cannot"),
        (["--set", "local_attn_size=2"], "smaller than a block of 3 frames"),
        (["--set", "local_attn_size=-1"], "local_attn_size"),
        (["--set", "local_atn_size=6"], "did you mean 'local_attn_size'"),
        (["--tflops", "700"], "--bandwidth"),
        (["--tflops", "0", "--bandwidth", "1"], "above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said):
    done = plan(*arguments)
    assert done.exit_code == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr


def test_help_teaches():
    shown = plan("--help")
    assert shown.exit_code == 0
    assert "Example: inferix plan --preset longlive --gpu rtx-4090" in shown.stdout
    assert all(name in " ".join(shown.stdout.split()) for name in CARDS)


def test_the_tables_in_the_docs_are_what_the_command_prints():
    text = DOC.read_text("utf-8")
    for table in plan("--table").stdout.strip().split("\n\n"):
        assert table in text, "docs/plan.md is old; put what inferix plan --table prints into it"
