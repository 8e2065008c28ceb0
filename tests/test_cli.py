import os
import signal
import subprocess
import sys
import threading

import pytest

import lamina
from lamina import cli
from lamina._core.errors import LoadError
from lamina.cli import Command, main


def command(*words, **options):
    """Run the command line in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "_lamina_entry", *words],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture
def failing(monkeypatch):
    """Make ``lamina demo`` raise what the test says."""

    def install(error):
        def run(options):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "demo", Command("", lambda parser: None, run))

    return install


def test_version():
    done = command("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"lamina {lamina.__version__} (JAX ")
    assert done.stderr == ""


def test_python_m_lamina():
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("lamina ")


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_the_demo(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for option in ("--seed", "--epochs", "--out DIR", "--quiet"):
        assert option in text


def test_without_a_command(capsys):
    assert main([]) == 2
    assert "usage: lamina" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["dmeo"], ["demo", "--epochs", "0"], ["demo", "--epochs", "x"], ["demo", "--sede", "1"]],
)
def test_wrong_words(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "lamina" in capsys.readouterr().err


def test_an_error_of_ours_is_one_message(failing, capsys, monkeypatch):
    monkeypatch.delenv("LAMINA_DEBUG", raising=False)
    failing(LoadError("the state dict does not fit"))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "lamina demo: the state dict does not fit\n"


def test_a_file_that_is_not_there(failing, capsys, monkeypatch):
    monkeypatch.delenv("LAMINA_DEBUG", raising=False)
    failing(FileNotFoundError(2, "No such file or directory", "x.safetensors"))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "lamina demo: x.safetensors: No such file or directory\n"


def test_debugging_raises(failing, monkeypatch):
    monkeypatch.setenv("LAMINA_DEBUG", "1")
    failing(LoadError("no"))
    with pytest.raises(LoadError):
        main(["demo"])


def test_a_bug_is_not_hidden(failing):
    failing(AssertionError("ours"))
    with pytest.raises(AssertionError):
        main(["demo"])


def test_an_interrupt_within_python(failing, capsys):
    failing(KeyboardInterrupt())
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "lamina: interrupted\n"


def test_the_directory_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().err == f"lamina demo: {tmp_path / 'taken'}: is not a directory\n"
    assert (tmp_path / "taken").read_text() == "mine"


def test_without_scikit_learn(tmp_path):
    code = (
        "import sys; sys.modules['sklearn'] = None; from lamina.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "scikit-learn, which is not installed" in done.stderr
    assert 'pip install "lamina[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "_lamina_entry", "demo", "--epochs", "1", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.wait(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors


@pytest.mark.parametrize("delay", [0.3, 0.8, 1.6])
def test_an_interrupt_during_the_start(delay, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "_lamina_entry", "demo", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    timer = threading.Timer(delay, process.send_signal, [signal.SIGINT])
    timer.start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == b"lamina: interrupted\n"
