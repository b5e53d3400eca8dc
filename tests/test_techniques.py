"""records/audit.py --techniques: what each technique is worth in a trained model."""

import dataclasses

import audit
import pytest
import torch
from conftest import draw, random_model

import train_gpt as tg

# By what an audit calls a technique, the setting that leaves it out when a model is made: one of its name, or
SETTINGS = {
    "bigram": "bigram_vocab_size", "smear": "smear_gate", "value_embedding": "ve_enabled",
    "xsa": "xsa_last_n",
}  # fmt: skip
PARTS = [*tg.EMBEDDING_PARTS, *tg.VALUE_PARTS, *tg.OUTPUT_PARTS]
SETTINGS |= {name: name for name in PARTS if name in tg.Hyperparameters.fields("model")}


@pytest.fixture(scope="module")
def world(tiny_hp) -> tg.World:
    return tg.World(tiny_hp, {})


@pytest.fixture(scope="module")
def validation(tiny_hp) -> tg.Validation:
    """Made-up text of eight windows."""
    positions = 8 * tiny_hp.eval_seq_len
    tokens = (draw("text", (positions + 1,)).abs() * 200).int() % tiny_hp.vocab_size
    return tg.Validation(tokens, torch.ones(positions, dtype=torch.uint8), "made up", table=None)


@pytest.fixture(scope="module")
def looped(tiny_hp) -> tg.GPT:
    """pr1855's parts, at the sizes of the others."""
    sizes = ("vocab_size", "model_dim", "num_heads", "num_kv_heads", "rope_dims", "eval_seq_len")
    hp = tg.Hyperparameters.from_env({"PRESET": "pr1855_smoke"})
    return random_model(dataclasses.replace(hp, **{name: getattr(tiny_hp, name) for name in sizes}))


def test_every_technique_of_1855_has_an_effect(looped, validation, world):
    names = {"token_smear", "sparse_gate", "xsa", "skips", "lanes", "loops"}
    found = audit.techniques(looped, validation, world)
    assert found.keys() == names and looped.looping
    assert len({each["loss_without"] for each in found.values()} | {found["xsa"]["loss"]}) == 1 + len(names)


def test_loops_and_skips_of_1855_switched_off(looped, validation, world):
    """The layers once each; the gates shut; what a lane takes of the other's."""
    found = audit.techniques(looped, validation, world)
    plans, looped.plans = looped.plans, 2 * (looped.plans[False],)
    once = audit.techniques(looped, validation, world)["loops"]
    looped.plans = 2 * (tuple(dataclasses.replace(visit, skip_from=None) for visit in plans[True]),)
    no_skips = audit.techniques(looped, validation, world)["skips"]
    looped.plans = plans
    assert once["loss"] == once["loss_without"] == found["loops"]["loss_without"]
    assert no_skips["loss"] == pytest.approx(found["skips"]["loss_without"], rel=1e-6)


@pytest.fixture(scope="module")
def found(tiny_hp, validation, world) -> dict[str, dict[str, float]]:
    """What is to be tested, of a model with every technique on."""
    return audit.techniques(random_model(tiny_hp), validation, world)


def off(*names: str) -> dict[str, object]:
    """Settings with their fields' own value for off."""
    return {name: tg.Hyperparameters.fields()[name].metadata["off"] for name in names}


def outputs(model: tg.GPT, validation: tg.Validation) -> torch.Tensor:
    with torch.no_grad():
        return model(validation.tokens[None, :64].long())


def test_every_technique_of_the_model_has_an_effect(found):
    assert found.keys() == {*SETTINGS, "skips"}, "a part with another name than its setting? see SETTINGS"
    assert len({each["loss"] for each in found.values()}) == 1
    for name, each in found.items():
        assert each["loss_without"] != each["loss"], name


@pytest.mark.parametrize("name", SETTINGS)
def test_a_technique_switched_off_is_a_model_that_never_had_it(tiny_hp, validation, world, found, name):
    """Made with the setting's own off value, from the same weights, less those of the technique."""
    model = tg.GPT(dataclasses.replace(tiny_hp, **off(SETTINGS[name])))
    weights = random_model(tiny_hp).state_dict()
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    size, text = tiny_hp.eval_seq_len, (validation.tokens, validation.byte_counts)
    windows = [(start, start + size, start) for start in range(0, 8 * size, size)]
    assert found[name]["loss_without"] == pytest.approx(tg.evaluate(model, *text, windows, world).val_loss)
    assert audit.switches(model).keys() == found.keys() - {name}


def test_skips_switched_off_add_nothing(tiny_hp, validation, world, found):
    model = random_model(tiny_hp)
    model.plans = [tuple(dataclasses.replace(visit, skip_from=None) for visit in tg.plan(tiny_hp))]
    skips = audit.techniques(model, validation, world)["skips"]
    assert skips["loss"] == skips["loss_without"] == found["skips"]["loss_without"]


class Dead:
    """A part that hands its input on, with the weights of the one that it stands for."""

    def __init__(self, part):
        if hasattr(part, "silent"):
            self.silent = part.silent

    def __call__(self, first, *_):
        return first


@pytest.mark.parametrize("name", SETTINGS)
def test_a_dead_part_is_found(tiny_hp, validation, world, name):
    model = random_model(tiny_hp)
    attns = [block.attn for block in model.blocks]
    for parts in (model.embedding_parts, *(p for a in attns for p in (a.value_parts, a.output_parts))):
        if name in parts:
            parts[name] = Dead(parts[name])
    found = audit.techniques(model, validation, world)
    dead = {key for key, each in found.items() if each["loss_without"] == each["loss"]}
    assert dead == {name}
    lines = [line for line in audit.techniques_table(found).splitlines() if "does nothing" in line]
    assert len(lines) == 1 and lines[0].startswith(name.replace("_", " "))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(tiny_hp, validation, world, monkeypatch, fails):
    """Weights, parts and their order; also where the scorer fails while a technique is off."""
    model = random_model(tiny_hp)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    hosts = [block.attn for block in model.blocks]
    order = lambda: [[*a.value_parts, *a.output_parts] for a in hosts] + [[*model.embedding_parts]]
    parts, logits = order(), outputs(model, validation)
    assert any(len(names) > 2 for names in parts)
    if fails:
        switch = audit.switches(model)
        for name in switch:
            with pytest.raises(OSError), audit.switched_off(model, name, switch[name]):
                assert not outputs(model, validation).equal(logits)
                raise OSError
    else:
        audit.techniques(model, validation, world)
    assert order() == parts and outputs(model, validation).equal(logits)
    assert all(p.equal(before[key]) for key, p in model.state_dict().items())


def test_a_model_without_techniques_has_no_table(tiny_hp, validation, world):
    plain = dataclasses.replace(tiny_hp, num_layers=1, **off(*SETTINGS.values()))
    assert audit.techniques(random_model(plain), validation, world) == {}


def test_the_table_begins_with_the_largest_effect():
    found = {"xsa": {"loss": 3.0, "loss_without": 2.9}, "bigram": {"loss": 3.0, "loss_without": 3.25}}
    head, *lines = [line.split() for line in audit.techniques_table(found).splitlines()]
    assert head == ["technique", "loss", "without", "effect"]
    assert lines == [["bigram", "3.0000", "3.2500", "+0.25000"], ["xsa", "3.0000", "2.9000", "-0.10000"]]
