"""A stand-in for vLLM, so that nnsight's own support of it runs where vLLM is not installed: `install()`, then import.

What it stands in for is vLLM itself, as small as possible: an engine that packs the tokens of several requests into one
slab a step (prompts whole, or in chunks, then one token each; it may preempt), norms that write into their arguments
as the fused kernels do, one projection for query, key and value, layers that return what is still to be added and the
residual. All of nnsight is its own: tracer, edits, worker, model runner, requests, batcher, and what is saved.

Everything between the client and the worker goes through pickle. It is for a process of its own: it takes the name.
"""

import pickle
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

WEIGHTS: dict[str, Any] = {}  # name of a model → (config, state of the plain model)
BARRED = ("interventions", "distill", "jaxtyping", "beartype")
context: Any = SimpleNamespace(spans=[])  # of the forward that is going on: (request, first row, tokens, past)


# Layers --------------------------------------------------------------------------------------------------------------


class LinearBase(nn.Module):
    """A projection, which returns its bias as a second value."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.tp_size = input_size, output_size, 1
        self.weight = nn.Parameter(torch.empty(output_size, input_size))

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        return linear(input_, self.weight), None


class ColumnParallelLinear(LinearBase): ...


class RowParallelLinear(LinearBase): ...


class VocabParallelEmbedding(nn.Embedding): ...


class RMSNorm(nn.Module):
    """The fused kernel: with a residual it adds, and writes both results into its arguments."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden_size)), eps

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.normalised(x)
        residual.add_(x)
        x.copy_(self.normalised(residual))
        return x, residual

    def forward(self, *args: Any) -> Any:
        return self.forward_native(*args)

    def normalised(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


# A model as vLLM writes it -------------------------------------------------------------------------------------------


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.width = config.hidden_size // config.num_attention_heads
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.sizes = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, sum(self.sizes))
        self.o_proj = RowParallelLinear(self.sizes[0], config.hidden_size)
        self.caches: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = (each.unflatten(-1, (-1, self.width)).transpose(0, 1) for each in qkv.split(self.sizes, -1))
        inverse = self.theta ** -(torch.arange(0, self.width, 2) / self.width)
        angles = (positions[:, None] * inverse).repeat(1, 2)[None]
        q, k = (each[0] for each in apply_rotary_pos_emb(q[None], k[None], angles.cos(), angles.sin()))
        mixed = [self.attended(q, k, v, *span) for span in context.spans]
        return self.o_proj(torch.cat(mixed))[0]

    def attended(self, q: Tensor, k: Tensor, v: Tensor, request: str, start: int, tokens: int, past: int) -> Tensor:
        rows = slice(start, start + tokens)
        old = self.caches[request] if past else (k[:, :0], v[:, :0])
        keys, values = (torch.cat([o[:, :past], n[:, rows]], 1) for o, n in zip(old, (k, v), strict=True))
        self.caches[request] = keys, values
        again = self.heads // self.groups
        scores = q[:, rows] @ keys.repeat_interleave(again, 0).mT * self.width**-0.5
        later = torch.arange(past + tokens) > torch.arange(past, past + tokens)[:, None]
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
        return (pattern @ values.repeat_interleave(again, 0)).transpose(0, 1).flatten(1)


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(silu(gate) * up)[0]


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config), LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any, inputs_embeds: Any) -> Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.model = config, LlamaModel(config)
        self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.lm_head.weight.T


class PassingOnLayer(LlamaDecoderLayer):
    """A layer that adds up by itself, and passes on what it was given as a second tensor, which nobody adds."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        middle = hidden_states + self.self_attn(positions, self.input_layernorm(hidden_states))
        return middle + self.mlp(self.post_attention_layernorm(middle)), residual


class LayerNorm(RMSNorm):
    def forward(self, hidden_states: Tensor, residuals: Tensor | None = None) -> Any:
        return self.normalised(hidden_states), residuals


class PassingOnForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(PassingOnLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = LayerNorm(config.hidden_size, config.rms_norm_eps)


class TransformersForCausalLM(LlamaForCausalLM):
    """One served through vLLM's Transformers backend: an axis of one example, and layers that return one tensor."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(AddingLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        hidden_states = self.model.embed_tokens(input_ids[None])
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, position_ids=positions[None])
        return self.model.norm.normalised(hidden_states)[0]


class AddingLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        given = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(position_ids[0], given[0])[None]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TwiceForCausalLM(LlamaForCausalLM):
    """One that calls a module twice in every step."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[-1].mlp = TwiceMLP(config)


class TwiceMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


KINDS = {
    "twice": TwiceForCausalLM,
    "native": LlamaForCausalLM,
    "passing on": PassingOnForCausalLM,
    "transformers": TransformersForCausalLM,
}


def network(name: str) -> LlamaForCausalLM:
    """The model of that name, with the weights that a plain one has, the projections fused."""
    config, state, kind = WEIGHTS[name]
    made = KINDS[kind](config)
    if made.lm_head.weight.is_meta:
        return made
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    wanted = {}
    for key in made.state_dict():
        part = key.split(".")[-2]
        parts = [key.replace(part, each) for each in fused.get(part, (part,))]
        wanted[key] = torch.cat([state[each] for each in parts])
    made.load_state_dict(wanted)
    return made.eval()


# The engine ----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Words w0, w1, … and their numbers."""

    pad_token = eos_token = eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    min_tokens: int = 0
    skip_reading_prefix_cache: bool = False
    extra_args: dict | None = None


@dataclass
class Completion:
    index: int
    token_ids: list[int]


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool


@dataclass
class Waiting:
    """A request. Its `req_id` is that of the worker."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    generated: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    is_new: bool = True

    def __post_init__(self) -> None:
        self.req_id = f"{self.request_id}-{uuid4().hex[:8]}"

    @property
    def tokens(self) -> list[int]:
        return self.prompt_token_ids + self.generated

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


State = namedtuple("State", ["scheduler_output", "logits"])


class GPUModelRunner:
    """Runs the model on the slab of a step. The buffers live on from step to step."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.requests: dict[str, Waiting] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.ids, self.positions = torch.zeros(2, 256, dtype=torch.long)
        self.execute_model_state: Any = None

    def load_model(self) -> None:
        self.model = network(self.vllm_config.model)

    def get_model(self) -> nn.Module:
        return self.model

    def _update_states(self, scheduler_output: Any) -> None:
        for data in scheduler_output.scheduled_new_reqs:
            self.requests[data.req_id] = data
        self.requests |= scheduler_output.states
        self.input_batch.req_ids = list(reversed(scheduler_output.num_scheduled_tokens))  # an order of its own

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        self._update_states(scheduler_output)
        start, context.spans = 0, []
        for request in self.input_batch.req_ids:
            count, state = scheduler_output.num_scheduled_tokens[request], self.requests[request]
            past = state.num_computed_tokens
            self.ids[start : start + count] = torch.tensor(state.tokens[past : past + count])
            self.positions[start : start + count] = torch.arange(past, past + count)
            context.spans.append((request, start, count, past))
            start += count
        hidden = self.model(
            input_ids=self.ids[:start], positions=self.positions[:start], intermediate_tensors=None, inputs_embeds=None
        )
        last = [first + count - 1 for _, first, count, _ in context.spans]
        self.execute_model_state = State(scheduler_output, self.model.compute_logits(hidden[last]))

    def sample_tokens(self, grammar: Any) -> dict[str, int]:
        sampled = self._sample(self.execute_model_state.logits).sampled_token_ids
        return dict(zip(self.input_batch.req_ids, sampled.flatten().tolist(), strict=True))

    def _sample(self, logits: Tensor) -> Any:
        return SimpleNamespace(sampled_token_ids=logits.argmax(-1, keepdim=True))


class Worker:
    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    def init_device(self) -> None:
        self.model_runner = GPUModelRunner(self.vllm_config)


class Bar(MetaPathFinder):
    """What is not installed where the engine is."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in BARRED:
            raise ModuleNotFoundError(f"No module named {name!r} (where the engine is)")


@contextmanager
def away() -> Iterator[None]:
    """Our packages are not there."""
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in BARRED}
    bar = Bar()
    for name in hidden:
        del sys.modules[name]
    sys.meta_path.insert(0, bar)
    try:
        yield
    finally:
        sys.meta_path.remove(bar)
        sys.modules.update(hidden)


class Core:
    """The other side of the process boundary: what comes and goes is pickled, and our packages are not there."""

    def __init__(self, vllm_config: Any, worker_cls: str) -> None:
        module, _, name = worker_cls.rpartition(".")
        self.worker = getattr(import_module(module), name)(vllm_config)
        self.worker.init_device()
        self.worker.model_runner.load_model()

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        with torch.inference_mode(), away():
            answer = getattr(self.worker, method)(*pickle.loads(pickle.dumps(args)))
        return [pickle.loads(pickle.dumps(answer))]

    @torch.inference_mode()
    def step(self, scheduler_output: Any) -> dict[str, int]:
        scheduler_output = pickle.loads(pickle.dumps(scheduler_output))
        runner = self.worker.model_runner
        with away():
            runner.execute_model(scheduler_output)
            return runner.sample_tokens(None)


class LLMEngine:
    """Reads as many tokens a step as `max_num_batched_tokens` lets it, of all requests."""

    def __init__(self, vllm_config: Any, worker_cls: str) -> None:
        self.vllm_config, self.engine_core = vllm_config, Core(vllm_config, worker_cls)
        self.waiting: list[Waiting] = []
        self.finished: set[str] = set()
        self.slabs: list[dict[str, int]] = []  # of each step: request → tokens

    def collective_rpc(self, method: str, args: tuple = ()) -> list:
        return self.engine_core.collective_rpc(method, args)

    def step(self) -> list[RequestOutput]:
        self._preempt()
        scheduled = self._schedule()
        new = [each for each in self.waiting if each.req_id in scheduled and each.is_new]
        states = {each.req_id: each for each in self.waiting if each.req_id in scheduled}
        output = SimpleNamespace(
            scheduled_new_reqs=new, num_scheduled_tokens=scheduled, finished_req_ids=self.finished, states=states
        )
        sampled = self.engine_core.step(output)
        self.slabs.append({states[each].request_id: count for each, count in scheduled.items()})
        self.finished = set()
        return [self._advance(each, scheduled[each.req_id], sampled) for each in states.values()]

    def _preempt(self) -> None:
        """Where the settings say so, the first request loses its cache in that step, and sits it out."""
        self.out = None
        if self.waiting and len(self.slabs) == self.vllm_config.preempt_in_step:
            self.out = self.waiting[0]
            self.out.num_computed_tokens = 0

    def _schedule(self) -> dict[str, int]:
        left, scheduled = self.vllm_config.scheduler_config.max_num_batched_tokens, {}
        for each in self.waiting:
            count = len(each.tokens) - each.num_computed_tokens
            if self.vllm_config.scheduler_config.enable_chunked_prefill:
                count = min(count, left)
            if count and count <= left and each is not self.out:
                scheduled[each.req_id] = count
                left -= count
        return scheduled

    def _advance(self, request: Waiting, count: int, sampled: dict[str, int]) -> RequestOutput:
        request.num_computed_tokens += count
        request.is_new = False
        if request.num_computed_tokens == len(request.tokens):
            request.generated.append(sampled[request.req_id])
        done = len(request.generated) == request.sampling_params.max_tokens
        if done:
            self.waiting.remove(request)
            self.finished.add(request.req_id)
        completions = [Completion(0, list(request.generated))]
        return RequestOutput(request.request_id, request.prompt_token_ids, completions, done)


class LLM:
    def __init__(self, model: str, worker_cls: str, enforce_eager: bool, **settings: Any) -> None:
        assert enforce_eager
        self.llm_engine = LLMEngine(configuration(model, **settings), worker_cls)
        self.made = 0

    def generate(self, prompts: Any, sampling_params: Any = None, lora_request: Any = None) -> list[RequestOutput]:
        prompts = prompts if isinstance(prompts, list) else [prompts]
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        for prompt, each in zip(prompts, params, strict=True):
            ids = Tokenizer().encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
            self.llm_engine.waiting.append(Waiting(str(self.made), list(ids), each))
            self.made += 1
        outputs = []
        while self.llm_engine.waiting:
            outputs += [output for output in self.llm_engine.step() if output.finished]
        return sorted(outputs, key=lambda output: int(output.request_id))


def configuration(
    model: str,
    *,
    enable_chunked_prefill: bool = False,
    enable_prefix_caching: bool = False,
    max_num_batched_tokens: int = 64,
    pipeline_parallel_size: int = 1,
    preempt_in_step: int | None = None,
    **rest: Any,
) -> Any:
    mine = SimpleNamespace(is_hybrid=False, is_attention_free=False)
    return SimpleNamespace(
        model=model, model_config=mine, additional_config={}, load_config=SimpleNamespace(),
        preempt_in_step=preempt_in_step,
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_parallel_size),
        cache_config=SimpleNamespace(enable_prefix_caching=enable_prefix_caching),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=enable_chunked_prefill, max_num_batched_tokens=max_num_batched_tokens
        ),
    )  # fmt: skip


class EngineArgs:
    def __init__(self, model: str, **settings: Any) -> None:
        settings.pop("tensor_parallel_size"), settings.pop("decode_context_parallel_size")
        self.made = configuration(model, **settings)

    def create_engine_config(self) -> Any:
        return self.made


class DummyModelLoader:
    def __init__(self, load_config: Any) -> None:
        pass

    def load_model(self, vllm_config: Any, model_config: Any) -> nn.Module:
        return network(vllm_config.model)


@contextmanager
def nothing(*args: Any, **kwargs: Any) -> Any:
    yield


def _none(*args: Any, **kwargs: Any) -> None:
    return None


NAMES = {
    "": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": RequestOutput},
    "config": {"VllmConfig": SimpleNamespace, "set_current_vllm_config": nothing},
    "distributed": dict.fromkeys(
        ("init_distributed_environment", "initialize_model_parallel",
                     "destroy_distributed_environment", "destroy_model_parallel"), _none
    ),
    "distributed.parallel_state": {
        "get_pp_group": lambda: SimpleNamespace(rank=0), "get_tensor_model_parallel_world_size": lambda: 1
    },
    "engine": {},
    "engine.arg_utils": {"EngineArgs": EngineArgs},
    "envs": {},
    "inputs": {"TokensPrompt": dict},
    "model_executor": {},
    "model_executor.layers": {},
    "model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
    "model_executor.layers.linear": {
        "ColumnParallelLinear": ColumnParallelLinear, "RowParallelLinear": RowParallelLinear
    },
    "model_executor.layers.rotary_embedding": {"_ROPE_DICT": {}},
    "model_executor.layers.vocab_parallel_embedding": {"VocabParallelEmbedding": VocabParallelEmbedding},
    "model_executor.model_loader": {},
    "model_executor.model_loader.dummy_loader": {"DummyModelLoader": DummyModelLoader},
    "tokenizers": {"cached_tokenizer_from_config": lambda model_config: Tokenizer()},
    "v1": {},
    "v1.engine": {},
    "v1.engine.llm_engine": {"LLMEngine": LLMEngine},
    "v1.worker": {},
    "v1.worker.gpu_model_runner": {"GPUModelRunner": GPUModelRunner},
    "v1.worker.gpu_worker": {"Worker": Worker},
}  # fmt: skip


def install() -> None:
    """Let `import vllm` find this."""
    RMSNorm.__module__ = "vllm.model_executor.layers.layernorm"
    for name, held in NAMES.items():
        path = f"vllm.{name}".rstrip(".")
        module = sys.modules[path] = ModuleType(path)
        module.__path__ = []
        vars(module).update(held)
        if name:
            parent, _, child = path.rpartition(".")
            setattr(sys.modules[parent], child, module)
