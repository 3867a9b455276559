"""Plans: done steps are left alone, interrupted ones go on, changed ones are refused or redone."""

import dataclasses
import json
from collections.abc import Mapping

import pytest

from gen.errors import GenError
from gen.plan import Encode, Evaluate, MakeRecords, Plan, Step, Train


@dataclasses.dataclass(frozen=True)
class Sum:
    """Adds a number to what it takes, in two files of which the second is interrupted on demand."""

    name: str
    number: int
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    about: str = ""

    def settings(self, given):
        return {"number": self.number}

    def run(self, given, out):
        self.calls.append("went on" if (out / "half").exists() else "began")
        out.mkdir(parents=True, exist_ok=True)
        (out / "half").write_text("")
        if self.number < 0:
            raise KeyboardInterrupt
        (out / "sum").write_text(str(self.number + sum(given.values())))

    def open(self, out):
        return int((out / "sum").read_text())


def chain(first=1, second=10, third=100):
    return (
        Sum("a", first),
        Sum("b", second, {"x": "a"}, about="adds ten"),
        Sum("c", third, {"x": "a", "y": "b"}),
    )


def ran(steps) -> str:
    return "".join(step.name for step in steps for _ in step.calls)


def test_steps_run_once_in_order_and_give_what_they_made(tmp_path, capsys):
    steps = chain()
    made = Plan(tmp_path, steps).run()
    assert dict(made) == {"a": 1, "b": 11, "c": 112}
    assert set(made.seconds) == {"a", "b", "c"}
    assert capsys.readouterr().out.splitlines() == ["[1/3] a: begins", "[2/3] b: adds ten", "[3/3] c: begins"]
    again = chain()
    assert dict(Plan(tmp_path, again).run()) == dict(made)
    assert ran(again) == ""
    assert capsys.readouterr().out.splitlines()[1] == "[2/3] b: done before"
    longer = (*chain(), Sum("d", 5, {"z": "c"}))
    assert Plan(tmp_path, longer).run()["d"] == 117
    assert ran(longer) == "d"


def test_an_interrupted_step_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Plan(tmp_path, (Sum("a", -1),)).run()
    assert "seconds" not in json.loads((tmp_path / "plan.json").read_text())["a"]
    step = dataclasses.replace(Sum("a", -1), calls=[])
    with pytest.raises(KeyboardInterrupt):
        Plan(tmp_path, (step,)).run()
    assert step.calls == ["went on"]


def test_a_changed_step_is_refused_and_redone_on_purpose_with_all_that_follow(tmp_path):
    Plan(tmp_path, chain()).run()
    with pytest.raises(GenError, match=r"step 'b' in .* was made before its settings changed; .*run\(redo=\['b'\]\)"):
        Plan(tmp_path, chain(second=20)).run()
    steps = chain(second=20)
    made = Plan(tmp_path, steps).run(redo=["b"])
    assert (made["b"], made["c"], ran(steps)) == (21, 122, "bc")
    assert steps[1].calls == ["began"]  # in a folder of its own, without what was there
    (tmp_path / "plan.json").write_text(json.dumps(json.loads((tmp_path / "plan.json").read_text()) | {"b": {}}))
    with pytest.raises(GenError, match="no step is called 'bb'; did you mean 'b'"):
        Plan(tmp_path, chain()).run(redo=["bb"])


def test_a_changed_input_is_named(tmp_path):
    Plan(tmp_path, chain()).run()
    state = json.loads((tmp_path / "plan.json").read_text())
    del state["a"]  # as if made by hand
    (tmp_path / "plan.json").write_text(json.dumps(state))
    with pytest.raises(GenError, match="a exists and is not of this plan"):
        Plan(tmp_path, chain()).run()
    (tmp_path / "a" / "sum").unlink()
    (tmp_path / "a" / "half").unlink()
    (tmp_path / "a").rmdir()
    with pytest.raises(GenError, match=r"step 'b' in .* was made before 'a' changed"):
        Plan(tmp_path, chain(first=2)).run()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Sum("a", 1), Sum("a", 2)), "step 'a'; expected a name of its own"),
        ((Sum("a/b", 1),), "step 'a/b'; expected a name of its own made of letters"),
        ((Sum("b", 1, {"x": "a"}), Sum("a", 1)), "step 'b' takes 'a', which no step before it makes; put it first"),
    ],
)
def test_plans_that_cannot_run(tmp_path, steps, message):
    with pytest.raises(GenError, match=message):
        Plan(tmp_path, steps)


def test_rounds_are_written_as_a_loop(tmp_path):
    def recipe(**given):
        raise AssertionError("not called before it runs")

    steps: list[Step] = [Train("flow-0", recipe)]
    for k in range(2):
        steps += [
            MakeRecords(f"pairs-{k}", f"flow-{k}", count=8),
            Train(f"flow-{k + 1}", recipe, {"teacher": f"flow-{k}", "pairs": f"pairs-{k}"}),
        ]
    steps += [Encode("latents", "flow-0", data=None), Evaluate("scores", recipe, {"of": "flow-2"})]
    assert len(Plan(tmp_path, tuple(steps)).steps) == 7
    assert not list(tmp_path.iterdir())
