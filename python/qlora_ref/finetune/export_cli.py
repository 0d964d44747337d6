"""`qlora-ref export`: an adapter as merged safetensors, merged GGUF (llama.cpp), or plain PEFT files."""

from .merge_cli import _run

DESCRIPTION = "Write an adapter for other programs: merged safetensors, merged GGUF for llama.cpp, or plain PEFT files."


def main(argv: list[str]) -> int:
    return _run(argv, "qlora-ref export", DESCRIPTION, True)
