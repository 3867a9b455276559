"""The reader of compiled programs, on programs written by hand as the compilers of TPUs and GPUs write theirs."""

from pathlib import Path

import pytest

from gen.training.hlo import Traffic, attention_calls, collectives, custom_calls, cycles, operations

TPU, GPU = (Path(__file__).parent.joinpath("programs", f"{name}.hlo.txt").read_text() for name in ("tpu", "gpu"))


def test_loops_count_as_often_as_they_run() -> None:
    times = {operation.name: operation.times for operation in operations(TPU)}
    assert (times["square"], times["loop"], times["work"]) == (1, 1, 3)
    assert "product" not in times  # inside a fusion nothing is scheduled
    assert {operation.times for operation in operations(GPU) if operation.name == "fmha"} == {12}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 7/8 of the 1024 bytes that 8 devices gather or scatter, three times
        (TPU, {"all-gather": Traffic(3, 3 * 896.0), "reduce-scatter": Traffic(3, 3 * 896.0)}),
        (
            GPU,
            {
                "all-reduce": Traffic(1, 2 * 16 * 3 / 4),
                "all-gather": Traffic(1, 32 / 2),
                "collective-permute": Traffic(1, 16.0),
                "reduce-scatter": Traffic(1, 16 / 2),
            },
        ),
    ],
)
def test_bytes_that_a_device_sends(text: str, expected: dict[str, Traffic]) -> None:
    assert collectives(text) == expected


def test_kernels_by_name() -> None:
    assert custom_calls(TPU) == attention_calls(TPU) == {"tpu_custom_call flash_attention": 1}
    assert attention_calls(GPU) == {"__cudnn$fmhaSoftmax": 12}


def test_cycles_are_summed_by_origin_without_the_waiting() -> None:
    assert cycles(TPU) == [
        ("jit(_step)/jvp()/while/body/dot_general", 300, 3),
        ("jit(_step)/mul", 40, 1),
        ("", 30, 3),
        ("jit(_step)/jvp()/flash_attention", 5, 1),
    ]
    assert cycles(GPU) == []
