"""Decode steps in fixed shapes: neither padding nor, on a GPU, CUDA graphs change the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import PAGE, assert_same_chains, assert_same_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, ragged, tiny_language_model

from alignpro.config import AdapterConfig
from alignpro.engine import Chain, Engine, SamplingParams, TokenPrompt
from alignpro.engine import worker as worker_module
from alignpro.engine.arena import MovingArena
from alignpro.engine.graphs import MAX_GRAPHS, DecodeGraphs
from alignpro.engine.plan_buffers import ALL_ROWS, Shape, padded, power_of_two
from alignpro.engine.static_plan import StaticPlan
from alignpro.errors import ConfigError, ModelError
from alignpro.models import paged_attention
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro_kernels import pages

TEMPLATE = ragged(1, 100, shortest=20, longest=20, seed=5)[0]
PROMPTS = [TEMPLATE + tail for tail in ragged(5, 100, shortest=1, longest=30, seed=6)]
SHARED = [PROMPTS[0] + tail for tail in ragged(2, 100, shortest=17, longest=20, seed=7)]  # a level deeper
PARAMS = SamplingParams(max_tokens=20, n=3, stop_token_ids=(0, 1, 2, 3))


@pytest.fixture(scope="module")
def exact() -> LanguageModel:
    """Return a model in float64, where differences beyond rounding are bugs."""
    return tiny_language_model("llama", dtype=torch.float64)


def test_few_shapes_cover_all_decode_steps() -> None:
    assert [padded(n) for n in (1, 8, 9, 17, 64, 65, 129, 256, 257, 321, 512, 513, 1000)] == [
        *(8, 8, 16, 32, 64, 128, 256, 256, 320, 384, 512, 640, 1024)
    ]
    assert len({padded(n) for n in range(1, 257)}) == 6 and len({padded(n) for n in range(1, 1025)}) == 14
    assert all(n <= padded(n) <= 5 * n // 4 for n in range(257, 4000))
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    # A level has one segment, one for eight rows, or as many as rows.
    shape = Shape.for_batch(17, [(1, 3), (4, 1), (5, 1), (17, 5)], ALL_ROWS, padded)
    assert shape == (32, ((1, 4), (4, 1), (32, 1), (32, 8)), ALL_ROWS)
    # An adapter on some of the tokens needs a padding token.
    assert Shape.for_batch(8, [(1, 1)], 5, padded) == (16, ((1, 1),), 16)
    assert Shape.for_batch(24, [(24, 1)], 0, padded).levels == ((32, 1),)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_padding_changes_nothing_at_the_boundaries_of_sizes(exact: LanguageModel, count: int) -> None:
    """Batches at a padded size, one above and one below; prompts that share nothing, a prefix, or two nested prefixes."""
    params = SamplingParams(max_tokens=12)
    prompts = (ragged(max(0, count - 7), 100, longest=40, seed=count) + PROMPTS + SHARED)[-count:]
    engine = Engine({"m": exact}, cuda_graphs="padded", audit=True)
    assert_same_groups(
        engine.generate("m", prompts, params), Engine({"m": exact}).generate("m", prompts, params), tolerance=1e-9
    )
    assert engine.stats.decode_ticks == {"padded": 11}


def test_attention_is_told_that_a_batch_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take no positions would align the last padding row with a segment's last key."""
    told: list[tuple[int, bool]] = []
    attend = paged_attention.cascade_attention

    def watched(query: torch.Tensor, *arguments: Any, in_order: bool, **options: Any) -> torch.Tensor:
        told.append((len(query), in_order))
        return attend(query, *arguments, in_order=in_order, **options)

    monkeypatch.setattr(paged_attention, "cascade_attention", watched)
    plain = tiny_language_model("gpt2")  # its layers are not fused
    Engine({"m": plain}, cuda_graphs="padded").generate("m", PROMPTS[:1], SamplingParams(max_tokens=3))
    assert {(rows == 8, in_order) for rows, in_order in told} == {(False, True), (True, False)}


def test_padding_changes_nothing_in_any_architecture(any_model: LanguageModel) -> None:
    """Paths have one to four nodes; the models have windows, soft caps and absolute positions."""
    prompts = [*PROMPTS, *SHARED, [1]]
    engine = Engine({"m": any_model}, cuda_graphs="padded", page_tokens=4, audit=True)
    expected = Engine({"m": any_model}).generate("m", prompts, PARAMS)
    assert_same_groups(engine.generate("m", prompts, PARAMS), expected)
    assert engine.stats.decode_ticks["padded"] > 10


def test_padding_changes_nothing_when_sequences_are_preempted(llama: LanguageModel) -> None:
    settings: dict[str, Any] = {"pool_bytes": 12 * PAGE, "audit": True}
    plain, engine = Engine({"m": llama}, **settings), Engine({"m": llama}, cuda_graphs="padded", **settings)
    params = SamplingParams(max_tokens=50, n=3)
    assert_same_groups(engine.generate("m", PROMPTS, params), plain.generate("m", PROMPTS, params))
    assert engine.stats.preemptions > 0 and engine.stats.decode_ticks["padded"] > 0


@given(
    pages=st.integers(8, 24),
    budget=st.sampled_from([1, 5, 4096]),
    max_batch=st.integers(1, 9),
    ahead=st.booleans(),
    chosen=st.lists(st.integers(0, 6), min_size=1, max_size=6),
)
@settings(max_examples=10)
def test_padding_changes_nothing_in_random_runs(
    llama: LanguageModel, pages: int, budget: int, max_batch: int, ahead: bool, chosen: list[int]
) -> None:
    prompts = [[*PROMPTS, *SHARED][i] for i in chosen]
    settings: dict[str, Any] = {"pool_bytes": pages * PAGE, "token_budget": budget, "max_batch": max_batch}
    plain = Engine({"m": llama}, **settings, audit=True)
    engine = Engine({"m": llama}, **settings, audit=True, cuda_graphs="padded", async_scheduling=ahead)
    assert_same_groups(engine.generate("m", prompts, PARAMS), plain.generate("m", prompts, PARAMS))


def test_decode_steps_of_a_soft_prompt_use_fixed_shapes() -> None:
    model = add_adapter(tiny_language_model("llama"), AdapterConfig(kind="soft_prompt", virtual_tokens=3))
    engine = Engine({"m": model.requires_grad_(False)}, cuda_graphs="padded", token_budget=1, audit=True)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), Engine({"m": model}).generate("m", PROMPTS, PARAMS))
    assert engine.stats.decode_ticks["padded"] > 0


def test_padding_changes_nothing_in_chains(llama: LanguageModel) -> None:
    target = tiny_language_model("qwen3", seed=1, num_key_value_heads=4, num_hidden_layers=3)

    def run(**settings: Any) -> list[list[Chain]]:
        return Engine({"policy": llama, "target": target}, **settings).run_chains(
            PROMPTS,
            rewrite=PARAMS,
            to_target=lambda i, sample: TokenPrompt([*TEMPLATE, *sample.tokens]),
            respond=PARAMS,
        )

    assert_same_chains(run(cuda_graphs="padded", audit=True), run())


def test_the_number_of_kept_shapes_is_bounded(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, cuda_graphs="padded", page_tokens=1, max_batch=40)
    engine.generate("m", ragged(60, 100, longest=60, seed=1), SamplingParams(max_tokens=60, stop_token_ids=(0, 1)))
    (worker,) = engine.workers.values()
    assert worker.graphs and 0 < len(worker.graphs._plans) <= MAX_GRAPHS
    engine.release()
    assert not worker.graphs._plans


def test_changes_that_invalidate_graphs_are_detected() -> None:
    model = add_adapter(tiny_language_model("llama"), AdapterConfig(kind="lora", rank=2))
    before = model.graph_key
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)  # in place: graphs stay valid
    assert model.graph_key == before
    with model.disable_adapter():
        assert model.graph_key != before
    assert model.graph_key == before
    weight = model.causal.get_input_embeddings().weight
    weight.data = weight.data.clone()
    assert model.graph_key != before
    engine = Engine({"m": model.requires_grad_(False)}, cuda_graphs="padded")
    engine.generate("m", PROMPTS, PARAMS)
    (worker,) = engine.workers.values()
    assert worker.graphs
    kept = dict(worker.graphs._plans.by_shape)
    worker.graphs.prepare("m", model)
    assert dict(worker.graphs._plans.by_shape) == kept
    weight.data = weight.data.clone()
    worker.graphs.prepare("m", model)
    assert not worker.graphs._plans


def test_graphs_need_a_gpu(llama: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs=True needs a GPU, but a model is on cpu"):
        Engine({"m": llama}, cuda_graphs=True).generate("m", PROMPTS, PARAMS)


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
    ],
)
def test_a_rotary_embedding_that_the_host_updates_is_refused_before_a_capture(
    architecture: str, rope: dict[str, Any]
) -> None:
    model = tiny_language_model(architecture, rope_parameters={"rope_theta": 10000.0} | rope)
    engine = Engine({"m": model}, cuda_graphs="padded")
    engine.generate("m", PROMPTS[:1], PARAMS)
    (worker,) = engine.workers.values()
    assert worker.graphs
    worker.graphs.capture = worker.graphs.required = True
    with pytest.raises(ModelError, match=rf"model {architecture}: .*rope_type {rope['rope_type']}.*cuda_graphs=False"):
        worker.graphs.prepare("m", model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    """A replay runs the same kernels on the same data as the padded step without a graph."""

    @staticmethod
    def model(architecture: str = "llama", **settings: Any) -> LanguageModel:
        return tiny_language_model(architecture, **settings).cuda()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_a_replay_gives_the_results_of_the_step(self, architecture: str, dtype: torch.dtype) -> None:
        model, prompts = self.model(architecture, dtype=dtype), [*PROMPTS, *SHARED, [1]]
        graphs, padded = (Engine({"m": model}, cuda_graphs=how, audit=True) for how in (True, "padded"))
        expected = padded.generate("m", prompts, PARAMS)
        for _ in range(2):  # the second run uses existing graphs and cached prompts
            assert_same_groups(graphs.generate("m", prompts, PARAMS), expected, tolerance=1e-6)
        assert graphs.stats.decode_ticks["captured"] > 0
        assert graphs.stats.decode_ticks["replayed"] > graphs.stats.decode_ticks["padded"]
        if dtype == torch.float32:
            assert_same_groups(
                expected, Engine({"m": model}, cuda_graphs=False).generate("m", prompts, PARAMS), tolerance=1e-4
            )

    def test_graphs_are_the_default(self) -> None:
        engine = Engine({"m": self.model()})
        engine.generate("m", PROMPTS, PARAMS)
        assert engine.stats.decode_ticks["replayed"] > 0

    def test_two_models_share_the_memory_of_graphs(self) -> None:
        models = {"policy": self.model(), "target": self.model("qwen3", seed=1, num_key_value_heads=4)}
        results = [
            Engine(models, cuda_graphs=how).run_chains(
                PROMPTS,
                rewrite=PARAMS,
                to_target=lambda i, sample: TokenPrompt([*TEMPLATE, *sample.tokens]),
                respond=PARAMS,
            )
            for how in (True, "padded")
        ]
        assert_same_chains(*results)

    @pytest.mark.parametrize("fixed", [True, False])
    def test_no_graph_keeps_an_old_address(self, monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
        """The arena grows, is released and allocated again; where it moves, its graphs are dropped."""
        if not fixed:
            monkeypatch.setattr(worker_module, "new_arena", MovingArena)
        model = self.model()
        expected = Engine({"m": model}, cuda_graphs=False).generate("m", PROMPTS, PARAMS)
        engine = Engine({"m": model}, cuda_graphs=True, page_tokens=1, audit=True)
        for prompt in range(len(PROMPTS)):
            engine.generate("m", PROMPTS[: prompt + 1], PARAMS)
        for _ in range(2):
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected, tolerance=1e-4)
            engine.release()
        (worker,) = engine.workers.values()
        assert worker.graphs and bool(worker.graphs._plans) == fixed and worker.pool.arena_bytes == 0

    def test_kept_prompts_are_read_at_their_new_address(self) -> None:
        models = {"policy": self.model(), "m": self.model("qwen3", seed=1, num_key_value_heads=4)}
        engine = Engine(models, cuda_graphs=True, pool_bytes=1 << 26, audit=True)
        expected = Engine(models, cuda_graphs=False).generate("m", PROMPTS, PARAMS)
        for _ in range(2):
            before = engine.stats.computed["prefill"]
            engine.generate("policy", PROMPTS, PARAMS)
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected, tolerance=1e-4)
            (pool,) = engine.pools.values()
            held = pool.arena_bytes
            engine.weights_updated("policy")
            engine.release(keep=["m"])
            assert pool.arena_bytes < held
        tokens = sum(len(node.tokens) for node in engine.workers[models["m"].device].tree.nodes("m"))
        assert engine.stats.computed["prefill"] - before == tokens  # only those of policy, which has the same prompts

    def test_weights_may_change_in_place_or_move(self) -> None:
        model = self.model()
        engine = Engine({"m": model}, cuda_graphs=True)
        engine.generate("m", PROMPTS, PARAMS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9)
        for moved in (False, True):
            if moved:
                old = [weight.data for weight in model.parameters()]
                for weight in model.parameters():
                    weight.data = weight.data.clone()
                for weight in old:
                    weight.fill_(torch.nan)
            engine.weights_updated("m")
            expected = Engine({"m": model}, cuda_graphs=False).generate("m", PROMPTS, PARAMS)
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected, tolerance=1e-4)

    @pytest.mark.parametrize("required", [True, False])
    def test_a_model_that_synchronizes_with_the_device_is_refused(
        self, required: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = self.model()
        expected = Engine({"m": model}, cuda_graphs=False).generate("m", PROMPTS, PARAMS)

        def look(_: object, args: tuple[torch.Tensor, ...]) -> None:
            assert bool(args[0].isfinite().all())

        hook = model.causal.base_model.layers[1].register_forward_pre_hook(look)
        engine = Engine({"m": model}, cuda_graphs=True if required else None, audit=True)
        if required:
            with pytest.raises(ModelError, match=r"model llama: .* captured as CUDA graphs: .*captur"):
                engine.generate("m", PROMPTS, PARAMS)
            hook.remove()
        for _ in range(2):
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected, tolerance=1e-4)
        torch.rand(1, device="cuda")  # raises while the generator believes that a capture goes on
        assert len([line for line in caplog.messages if "cannot be captured" in line]) == (not required)
        assert bool(engine.stats.decode_ticks["replayed"]) == required
        hook.remove()

    def test_a_replayed_step_never_synchronizes_with_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = Engine({"m": self.model()}, cuda_graphs=True)
        expected = engine.generate("m", PROMPTS, PARAMS)
        plan, states = DecodeGraphs.plan, DecodeGraphs.states

        def unwaiting(method: Callable[..., Any], *arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def states_unwaiting(self: DecodeGraphs, name: str, model: Any, static: StaticPlan, stats: Any) -> torch.Tensor:
            if static.graph is None:
                return states(self, name, model, static, stats)
            return unwaiting(states, self, name, model, static, stats)

        monkeypatch.setattr(DecodeGraphs, "plan", lambda *arguments: unwaiting(plan, *arguments))
        monkeypatch.setattr(DecodeGraphs, "states", states_unwaiting)
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected, tolerance=1e-6)

    def test_a_soft_prompt(self) -> None:
        config = AdapterConfig(kind="soft_prompt", virtual_tokens=3)
        model = add_adapter(tiny_language_model("llama"), config).requires_grad_(False).cuda()
        engine = Engine({"m": model}, cuda_graphs=True)
        assert_same_groups(
            engine.generate("m", PROMPTS, PARAMS),
            Engine({"m": model}, cuda_graphs="padded").generate("m", PROMPTS, PARAMS),
        )
        assert engine.stats.decode_ticks["replayed"] > 0

    def test_without_the_kernels_that_write_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        expected = Engine({"m": model}, cuda_graphs=True).generate("m", PROMPTS, PARAMS)
        monkeypatch.setattr(pages, "_has_kernels", lambda device: False)
        assert_same_groups(Engine({"m": model}, cuda_graphs=True).generate("m", PROMPTS, PARAMS), expected)
