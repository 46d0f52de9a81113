"""Estimates against what real towers and engines hold; the search for a micro-batch against a linear memory."""

import gc
from functools import partial

import pytest
import torch
import yaml
from distributed.spawn import run_on_ranks
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from evaclip.config import ModelConfig, TrainConfig
from evaclip.data.batch import Batch, PackedText
from evaclip.engine import create_engine
from evaclip.engine.prepare import prepare
from evaclip.errors import ConfigError
from evaclip.freezing import freeze
from evaclip.loss import ContrastiveLoss
from evaclip.memory import activation_bytes, advice, is_out_of_memory, state_bytes
from evaclip.models.clip import create_model
from evaclip.trial import available_bytes, largest_micro_batch, peak_bytes, reset_peak

CPU = torch.device("cpu")
GIB = 2**30
TOKENS = 16


def batch_of(samples, side=16):
    text = PackedText.pack([[1] * TOKENS] * samples)
    return Batch(torch.zeros(samples, 3, side, side, dtype=torch.uint8), text, torch.arange(samples))


# -------------------------------------------------------------------------------------------------------------- state

ENGINES = {
    "torch": {"engine__name": "torch"},
    **{f"zero{n}": {"engine__name": "deepspeed", "engine__zero_stage": n} for n in (1, 2, 3)},
}
HELD = [("torch", "bf16_weights"), ("zero1", "fp32"), ("zero2", "bf16_weights"), ("zero3", "fp32")]
HELD = [(*case, frozen) for case in HELD for frozen in ("0", "all")]
"""Engine, precision, and how much of the image tower does not learn."""
WIDE = {"model__image__width": 256, "model__image__mlp_width": 512, "model__text__width": 16}


def storages():
    """Address -> bytes of all storages that Python sees, gradients included."""
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


def held_in_backward(ranks, folder, *, changes):
    """Number of parameters and of frozen ones; bytes of all storages when they are most in the second backward."""
    before = set(storages())
    config = tiny_config(folder, **changes)
    clip = create_model(config.model)
    freeze(clip, config.optim)
    num_parameters = sum(p.numel() for p in clip.parameters())
    num_frozen = sum(p.numel() for p in clip.parameters() if not p.requires_grad)
    engine = create_engine(config, clip, ContrastiveLoss(config.loss, CPU), ranks)
    seen = []

    def look(_):
        seen.append(sum(size for address, size in storages().items() if address not in before))

    for last in (False, True):
        features = engine.forward(batch_of(2), last=last)
        if last:
            embeddings = (clip.image.patch_embed.weight, clip.text.position_embedding, clip.text.token_embedding.weight)
            for p in (*embeddings, clip.image.norm.weight):
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(look)
        engine.backward(features.image.sum() + features.text.sum())
    return num_parameters, num_frozen, max(seen)


def changes_of(engine, precision, frozen):
    parts = {"optim__image__freeze": yaml.safe_load(frozen), "init__model": "unused"}
    return {**ENGINES[engine], **WIDE, **parts, "train__precision": precision}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    cases = {"_".join(case): partial(held_in_backward, changes=changes_of(*case)) for case in HELD}
    return run_on_ranks(2, cases, tmp_path_factory.mktemp("held"))


@pytest.mark.matrix
@pytest.mark.parametrize("case", HELD, ids="_".join)
def test_state_is_what_two_ranks_hold_in_backward(held, case):
    config = tiny_config("unused", **changes_of(*case))
    for num_parameters, num_frozen, measured in held["_".join(case)]:
        estimated = sum(state_bytes(num_parameters, config, 2, num_frozen))
        if case[:2] == ("torch", "bf16_weights"):
            estimated += 2 * (num_parameters - num_frozen)  # 16-bit gradients, which come as activations go
        # the rest is activations and the optimizer's buffer; one layout differs from another by 2 bytes per parameter
        assert 0 <= measured - estimated < num_parameters


@pytest.mark.parametrize(
    ("engine", "precision", "bytes_per_parameter"),
    [
        ("torch", "fp32", (4, 4, 8)),
        ("torch", "bf16", (6, 4, 8)),
        ("torch", "fp16", (6, 4, 8)),
        ("torch", "bf16_weights", (6, 4, 8)),
        ("zero1", "bf16", (4 + 2 + 1, 4, 2)),
        ("zero2", "bf16", (4 + 2 + 1, 1, 2)),
        ("zero3", "bf16", (1 + 2 + 1 + 4 / 10, 1, 2)),
        ("zero1", "bf16_weights", (2 + 1, 2, 2)),
        ("zero2", "bf16_weights", (2 + 1, 1, 2)),
        ("zero3", "bf16_weights", (0.5 + 1 + 2 / 10, 1, 2)),
    ],
)
def test_state_on_four_ranks(engine, precision, bytes_per_parameter):
    num_parameters = 10**10  # of which ZeRO-3 gathers a tenth
    config = tiny_config("unused", **ENGINES[engine], train__precision=precision)
    state = state_bytes(num_parameters, config, 4)
    number = 2 if precision == "bf16_weights" and engine != "zero3" else 4
    bucket = 0 if engine == "torch" else number * 5e8
    expected = [each * num_parameters for each in bytes_per_parameter]
    assert state == pytest.approx((expected[0], expected[1] + bucket, expected[2]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights"])
def test_what_is_frozen_is_stored_and_nothing_else(engine, precision):
    config = tiny_config("unused", **ENGINES[engine], train__precision=precision)
    part, whole = state_bytes(10**6, config, 4), state_bytes(5 * 10**6, config, 4, num_frozen=4 * 10**6)
    stored = 2 if precision == "bf16_weights" else 4
    assert whole.weights - part.weights == pytest.approx(4e6 * stored / (4 if engine == "zero3" else 1))
    assert whole[1:] == part[1:]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_average_takes_four_bytes_more(engine):
    plain, averaged = (
        state_bytes(10**6, tiny_config("unused", **ENGINES[engine], optim__ema_decay=decay), 4)
        for decay in (None, 0.99)
    )
    assert averaged[:2] == plain[:2]
    assert averaged.optimizer == 1.5 * plain.optimizer


def test_offloaded_optimizer_leaves_weights_and_a_bucket_on_the_gpu():
    config = tiny_config("unused", **ENGINES["zero2"], engine__offload_optimizer=True, train__precision="bf16_weights")
    assert state_bytes(10**10, config, 4) == (2e10, 1e9, 0)


# -------------------------------------------------------------------------------------------------------- activations


def saved_by_real_towers(config, samples):
    """Bytes that autograd saves in a forward on the CPU, each storage once, without parameters."""
    clip = create_model(config.model)
    freeze(clip, config.optim)
    towers = prepare(clip, config.train, CPU)
    own = {p.untyped_storage().data_ptr() for p in towers.parameters()}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = batch_of(samples, config.model.image.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = towers(batch.images, batch.text, batch.seeds)
    assert features.image.requires_grad or features.text.requires_grad
    return sum(storage.nbytes() for address, storage in found.items() if address not in own)


DEEP = {"model__image__depth": 3, "model__text__depth": 4}


@pytest.mark.parametrize(
    ("precision", "token_drop", "changes"),
    [
        ("fp32", 0.0, {}),
        ("fp32", 0.5, {"model__image__drop_path": 0.3}),
        ("bf16_weights", 0.5, {"model__image__post_norm": True}),
    ],
)
def test_activations_are_what_real_towers_save(precision, token_drop, changes):
    options = {"model__image__token_drop": token_drop, "train__precision": precision, **DEEP, **changes}
    config = tiny_config("unused", **options)
    real = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    assert activation_bytes(config.model, config.train, TOKENS, on_gpu=False) == real


@pytest.mark.parametrize("frozen", [("all", 4), (1, 1), (3, "all")])
def test_activations_of_what_is_frozen_are_not_kept(frozen):
    changes = {"optim__image__freeze": frozen[0], "optim__text__freeze": frozen[1], "init__model": "unused"}
    config = tiny_config("unused", **DEEP, **changes, model__image__drop_path=0.3)
    real = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    assert activation_bytes(config.model, config.train, TOKENS, frozen=config.optim.frozen, on_gpu=False) == real


def test_frozen_towers_keep_nothing_and_their_last_layers_little_with_checkpointed_blocks_too():
    model = tiny_config("unused", **DEEP).model
    train = TrainConfig(steps=1, global_batch=2, precision="bf16", activation_checkpointing=True)

    def kept(image, text):
        return activation_bytes(model, train, TOKENS, frozen=(image, text))

    assert kept("all", "all") == 0
    assert 0 < kept(3, "all") < 0.1 * kept(2, "all")


def test_activations_under_autocast_are_what_real_towers_save():
    config = tiny_config("unused", **DEEP, train__precision="bf16")
    real = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    # Without storage, the CPU's LayerNorm of 16 bits keeps two statistics per token in 16 bits instead of 32.
    difference = 4 * (1 + config.model.image.kept_patches) * 2 * config.model.image.depth
    assert activation_bytes(config.model, config.train, TOKENS, on_gpu=False) == real - difference


def timm_config(name, **changes):
    drops = {"token_drop": 0.5} if name == "test_vit" else {}
    image = {"kind": "timm", "model": name, "image_size": 32, "drop_path": 0.3, **drops}
    return tiny_config("unused", model__image=image, **changes)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_activations_of_a_timm_tower_are_what_it_saves(name):
    config = timm_config(name, train__precision="fp32")
    real = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    assert activation_bytes(config.model, config.train, TOKENS, on_gpu=False) == real


def test_checkpointing_a_timm_tower_leaves_its_largest_block():
    config = timm_config("test_convnext", train__activation_checkpointing=True, model__text__depth=1)
    inputs = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    first = create_model(config.model).image.blocks[0]  # of most positions
    own = {p.untyped_storage().data_ptr() for p in first.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        first(torch.zeros(1, 24, 8, 8, requires_grad=True))
    largest = sum(storage.nbytes() for address, storage in found.items() if address not in own)
    assert activation_bytes(config.model, config.train, TOKENS) - inputs == pytest.approx(largest, rel=0.05)


def test_autocast_keeps_at_most_a_16_bit_copy_of_the_weights():
    config = tiny_config("unused", train__precision="bf16")
    two, four = saved_by_real_towers(config, 2), saved_by_real_towers(config, 4)
    model = create_model(config.model)
    copied = sum(p.numel() for p in model.parameters()) - model.text.token_embedding.weight.numel()
    assert 0.8 * 2 * copied < two - (four - two) <= 2 * copied  # all but positions, norms and biases


def test_activations_of_checkpointed_blocks_are_their_inputs_and_one_block():
    config = tiny_config("unused", **DEEP, train__activation_checkpointing=True)
    inputs = (saved_by_real_towers(config, 8) - saved_by_real_towers(config, 2)) / 6
    plain = config.train.model_copy(update={"activation_checkpointing": False})
    whole = activation_bytes(config.model, plain, TOKENS)
    # all blocks of a tower are alike, and those of these two towers nearly so
    one_block = activation_bytes(config.model, config.train, TOKENS) - inputs
    assert whole / 7 < one_block < whole / 6


@pytest.mark.parametrize("precision", ["bf16"])
def test_checkpointing_dropped_patches_and_shorter_captions_save_activations(precision):
    model, train = ModelConfig(name="EVA02-CLIP-B-16"), TrainConfig(steps=1, global_batch=2, precision=precision)
    dropped = ModelConfig.model_validate({"name": "EVA02-CLIP-B-16", "image": {"token_drop": 0.5}})
    checkpointed = train.model_copy(update={"activation_checkpointing": True})
    everything = activation_bytes(model, train)
    assert activation_bytes(model, train, 20) < everything
    assert 0.5 * everything < activation_bytes(dropped, train) < 0.65 * everything  # text does not drop
    assert 0.05 * everything < activation_bytes(model, checkpointed) < 0.2 * everything


def test_fewer_bits_save_activations_and_norms_cost_more_on_gpus():
    model = ModelConfig(name="EVA02-CLIP-B-16")

    def of(precision, **where):
        return activation_bytes(model, TrainConfig(steps=1, global_batch=2, precision=precision), **where)

    assert of("bf16_weights") < of("bf16", on_gpu=False) < of("bf16", on_gpu=True) < 0.7 * of("fp32")
    assert of("fp16") == of("bf16")
    assert of("fp32", on_gpu=False) == of("fp32", on_gpu=True)


def test_compilation_is_not_looked_at():
    config = tiny_config("unused")
    compiled = tiny_config("unused", train__compile=True)
    assert activation_bytes(compiled.model, compiled.train) == activation_bytes(config.model, config.train)


def test_five_billion_parameters_take_no_memory_to_estimate():
    model, train = ModelConfig(name="EVA02-CLIP-bigE-14-plus"), TrainConfig(steps=1, global_batch=2)
    activation_bytes(ModelConfig(), train)  # what is loaded at the first use
    reset_peak(CPU)
    before = peak_bytes(CPU)
    assert 1.5 * GIB < activation_bytes(model, train) < 1.7 * GIB
    assert peak_bytes(CPU) - before < 0.1 * GIB


# ------------------------------------------------------------------------------------------------------------- advice


def large(**changes):
    model = {"name": "EVA02-CLIP-L-14", "image": {}, "text": {}}
    return tiny_config("unused", **{"model": model, "train__global_batch": 1024, **changes})


def keys(lines):
    return [line.split(" (now")[0] for line in lines]


def test_advice_names_key_value_and_what_it_saves_the_largest_first():
    lines = advice(large(train__micro_batch=128), 8)
    saved = [float(line.partition("about ")[2].split()[0]) for line in lines]
    assert saved == sorted(saved, reverse=True)
    config = large()
    half = 64 * activation_bytes(config.model, config.train) / GIB
    assert f"train.micro_batch=64 (now 128) saves about {half:.1f} GiB" in lines
    assert set(keys(lines)) == {
        "train.micro_batch=64",
        "train.activation_checkpointing=true",
        "model.image.token_drop=0.75",
        "train.precision=bf16",
        "engine.name=deepspeed engine.zero_stage=1",
    }
    assert [line for line in lines if "changes the training" in line] == [
        line for line in lines if line.startswith("model.image.token_drop=0.75 (now 0.0)")
    ]


@pytest.mark.parametrize(
    ("changes", "world_size", "absent"),
    [
        ({"train__micro_batch": 1}, 8, "train.micro_batch"),
        ({"train__micro_batch": "auto"}, 8, "train.micro_batch"),
        ({"train__activation_checkpointing": True}, 8, "train.activation_checkpointing"),
        ({"model__image__token_drop": 0.75}, 8, "model.image.token_drop"),
        ({"train__precision": "bf16"}, 8, "train.precision"),
        ({}, 1, "engine.name=deepspeed engine.zero_stage"),
        (ENGINES["zero3"], 8, "engine.zero_stage"),
        ({**ENGINES["zero2"], "train__compile": True}, 8, "engine.zero_stage"),  # ZeRO-3 would refuse compilation
        ({**ENGINES["zero1"], "train__precision": "bf16_weights"}, 8, "train.micro_batch"),  # would add up in 16 bits
    ],
)
def test_advice_leaves_out_what_does_not_apply_or_saves_nothing(changes, world_size, absent):
    assert not [key for key in keys(advice(large(**changes), world_size)) if key.startswith(absent)]


@pytest.mark.parametrize(("stage", "following"), [("zero1", 2), ("zero2", 3)])
def test_advice_goes_one_zero_stage_further(stage, following):
    config = large(**ENGINES[stage], model__name="EVA02-CLIP-bigE-14-plus")
    assert f"engine.zero_stage={following}" in keys(advice(config, 8))
    assert "engine.offload_optimizer=true" in keys(advice(config, 1))


def test_precision_is_no_advice_for_cpus():
    assert not [key for key in keys(advice(large(), 1, on_gpu=False)) if key.startswith("train.precision")]


# ------------------------------------------------------------------------------------------------------ out of memory


def test_failed_allocation_is_out_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_allocators_errors_are_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("DefaultCPUAllocator"), KeyboardInterrupt()]
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


# ------------------------------------------------------------------------------------------------------------- search


class LinearMemory:
    """Peak bytes that grow with the samples, and the sizes that were asked for."""

    def __init__(self, fixed, per_sample):
        self.fixed, self.per_sample = fixed, per_sample
        self.measured = []

    def __call__(self, samples):
        self.measured.append(samples)
        return self.of(samples)

    def of(self, samples):
        return self.fixed + self.per_sample * samples


@pytest.mark.parametrize(
    ("share", "budget", "expected", "measured"),
    [
        (1, 110, 1, [1]),
        (2, 120, 2, [1, 2]),
        (2, 119, 1, [1]),
        (64, 10_000, 64, [1, 2, 4, 8, 16, 32, 64]),
        (100, 1_100, 100, [1, 2, 4, 8, 16, 32, 64]),
        (100, 1_099, 50, [1, 2, 4, 8, 16, 32, 64]),
        (100, 440, 34, [1, 2, 4, 8, 16, 32]),  # three pieces
        (100, 430, 25, [1, 2, 4, 8, 16, 32]),  # 33 would fit, but is not a third
        (7, 130, 3, [1, 2]),
    ],
)
def test_largest_micro_batch(share, budget, expected, measured):
    memory = LinearMemory(100, 10)
    assert largest_micro_batch(share, memory, budget, growth=10, remedies=list) == expected
    assert memory.measured == measured


counts = st.integers(1, 5000)
sizes = st.integers(0, 10**12)


@given(share=counts, fixed=sizes, per_sample=sizes, room=sizes, factor=st.floats(1, 3))
def test_result_fits_and_nothing_beyond_the_budget_is_tried(share, fixed, per_sample, room, factor):
    memory = LinearMemory(fixed, per_sample)
    budget = memory.of(1) + room
    found = largest_micro_batch(share, memory, budget, growth=factor * per_sample, remedies=list)
    assert found == -(-share // -(-share // found))  # equal pieces
    assert all(memory.of(size) <= budget for size in [found, *memory.measured])


@given(share=counts, fixed=sizes, per_sample=sizes, room=sizes)
def test_one_piece_less_does_not_fit(share, fixed, per_sample, room):
    memory = LinearMemory(fixed, per_sample)
    budget = memory.of(1) + room
    pieces = -(-share // largest_micro_batch(share, memory, budget, growth=per_sample, remedies=list))
    assert pieces == 1 or memory.of(-(-share // (pieces - 1))) > budget


def test_a_size_that_needs_more_than_the_line_said_is_not_taken():
    peaks = {1: 10, 2: 20, 4: 60}
    assert largest_micro_batch(100, peaks.__getitem__, 45, growth=10, remedies=list) == 2


def test_one_sample_that_does_not_fit_is_an_error_with_advice():
    text = r"takes 3.00 GiB, and 2.00 GiB may be used; change one of these:\n  train.activation_checkpointing=true$"
    with pytest.raises(ConfigError, match=text):
        largest_micro_batch(
            8, LinearMemory(2 * GIB, GIB), 2 * GIB, growth=GIB, remedies=lambda: ["train.activation_checkpointing=true"]
        )


# ---------------------------------------------------------------------------------------------------------- measuring


def test_peak_is_that_of_the_time_since_it_was_reset():
    reset_peak(CPU)
    before = peak_bytes(CPU)
    torch.ones(GIB // 8)  # half a GiB, for a moment
    during = peak_bytes(CPU)
    reset_peak(CPU)
    assert 0.45 * GIB < during - before < 0.6 * GIB
    assert during - peak_bytes(CPU) > 0.45 * GIB


def machine(root, *, groups, **files):
    """A host with 8 GiB free, of which this process holds one more, and control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Total: 0\n")
    (root / "proc/self/status").write_text(f"Name:\tpython\nVmRSS:\t {1 << 20} kB\nThreads:\t1\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


@pytest.mark.parametrize("processes", [1, 4])
def test_available_is_nine_tenths_of_what_is_held_and_this_processs_share_of_the_rest(tmp_path, processes):
    root = machine(tmp_path, groups="0::/\n")
    assert available_bytes(CPU, processes, root) == pytest.approx(0.9 * (1 + 8 / processes) * GIB)


def test_available_keeps_the_limit_of_an_outer_control_group(tmp_path):
    files = {
        "job/step/memory.max": "max\n",
        "job/step/memory.current": GIB,
        "job/step/memory.stat": "anon 5\n",
        "job/memory.max": 4 * GIB,
        "job/memory.current": 3 * GIB,
        "job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    root = machine(tmp_path, groups="0::/job/step\n", **files)
    assert available_bytes(CPU, 2, root) == pytest.approx(0.9 * (1 + 2 / 2) * GIB)


def test_available_keeps_the_limit_of_a_control_group_of_version_1(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": 5 * GIB,
        "memory/job/memory.usage_in_bytes": 2 * GIB,
        "memory/job/memory.stat": "total_inactive_file 0\n",
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 20 * GIB,
        "memory/memory.stat": "total_inactive_file 0\n",
    }
    root = machine(tmp_path, groups="7:cpu,cpuacct:/\n4:memory:/job\n1:name=systemd:/\n0::/job\n", **files)
    assert available_bytes(CPU, 1, root) == pytest.approx(0.9 * (1 + 3) * GIB)


def test_available_on_this_machine_is_more_than_this_process_holds():
    reset_peak(CPU)
    assert peak_bytes(CPU) < available_bytes(CPU)
