"""The configuration tree: every knob of every process, its type, its limits and its default.

Knows what can be set. Does not know where a value comes from: `config_tree.py` reads files' trees and flags. The tree
has the same shape everywhere (laptop, container, ConfigMap), and every process reads the part it needs. From the
environment come identity (`POD_NAME`, `POD_IP`, `POD_REVISION`) and secrets (`REDIS_URL`) only.
`docs/configuration.md` is generated from this file.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Weights(StrEnum):
    NATIVE = "native"
    INT8 = "int8"
    INT4 = "int4"
    DUMMY = "dummy"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str = Field(
        "smollm2",
        description="A folder of safetensors, a GGUF file, a Hugging Face hub id, the name of a packaged model "
        "(`smollm2`), or `fake` (arithmetic instead of a model, for tests).",
    )
    name: str | None = Field(None, description="The name clients use. Default: derived from `path`.")
    dtype: DType = Field(
        DType.AUTO,
        description="Of weights, activations and KV. `auto`: bfloat16 where the device computes in it, else float32.",
    )
    weights: Weights = Field(
        Weights.NATIVE,
        description="How weights lie in memory on a CPU: `native` (as `dtype`), `int8` (a scale per output), or `int4` "
        "(groups of 32; embedding and head stay int8), quantised once at load. Fewer bytes are read per token, and "
        "answers change a little. KV is the same kind in all three, so prefill and decode workers of one fleet may "
        "differ: `native` where prompts are read, `int4` where answers are written. `dummy`: random numbers in the "
        "shape of `path`, which is then a folder with a `config.json`, or `llama-3.1-8b`, `qwen3-8b` or "
        "`qwen3-30b-a3b`; to measure without weights.",
    )
    device: str = Field("cpu", description="A torch device: `cpu`, `cuda`, `cuda:1`.")
    max_context: int | None = Field(
        None, ge=16, description="Longest prompt plus answer, in tokens. Default: the model's."
    )
    cache_dir: str | None = Field(None, description="Where converted models are kept. Default: `~/.cache/packlight`.")


class PolicyRow(Section):
    min_tokens: int = Field(
        ge=0, description="Prompts of at least this many tokens; the row with the most that a prompt reaches applies."
    )
    recipe: str = Field(description="A recipe of docs/recipes.md.")
    ratio: float | None = Field(
        None, gt=0, le=1, description="Share of the prompt kept per KV head. Default: the recipe's."
    )
    window: int | None = Field(None, ge=1, description="Last prompt tokens that do the scoring. Default: the recipe's.")
    codec: str | None = Field(None, description="How the kept KV travels. Default: the recipe's.")
    on_hit: str | None = Field(
        None, description="The recipe instead, where `recipe` could not use what is cached of the prompt."
    )


class PolicyConfig(Section):
    reference_context: int = Field(
        131_072,
        ge=1,
        description="Context length that `min_tokens` is meant for; with a shorter one it shrinks in proportion.",
    )
    floor: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Least share of the window's attention mass that a layer keeps; its budget grows until it holds.",
    )
    reasoning_ratio: float = Field(
        0.3, gt=0, le=1, description="Reasoning requests keep at least this share of the prompt, whatever the row says."
    )
    reuse_ratio: float = Field(
        0.25, gt=0, le=1, description="Share of the prompt that must be cached for a row's `on_hit` to apply."
    )
    rows: tuple[PolicyRow, ...] = Field(
        (
            PolicyRow(min_tokens=0, recipe="none"),
            PolicyRow(min_tokens=8192, recipe="snapkv", ratio=0.5),
            PolicyRow(min_tokens=32_768, recipe="snapkv", ratio=0.25, window=64),
            PolicyRow(min_tokens=131_072, recipe="snapkv", ratio=0.25, window=64, codec="int8"),
        ),
        min_length=1,
        description="By ascending `min_tokens`, the first from 0. A file that sets this replaces the whole table.",
    )


class KVConfig(Section):
    page_size: int = Field(16, ge=1, le=256, description="Tokens per page. The whole fleet must agree on it.")
    recipe: str = Field(
        "auto", description="The recipe of a request that does not name one; `auto` chooses by `kv.policy`."
    )
    budget: int | None = Field(
        None, ge=1, description="Default tokens kept per KV head, for a named recipe that drops tokens."
    )
    floor: float = Field(0.0, ge=0, lt=1, description="`kv.policy.floor` for named recipes; 0 is none.")
    policy: PolicyConfig = PolicyConfig()


class RouterConfig(Section):
    host: str = Field("127.0.0.1", description="Address the HTTP API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP API; 0 picks a free one.")
    api_keys_file: str | None = Field(
        None,
        description="A file of API keys, one a line; requests then need one as `Authorization: Bearer <key>`. Read "
        "again when it changes. Health, metrics and the console's page stay open. None: everybody may ask.",
    )
    console: bool = Field(
        True,
        description="Serve the console at `/`: a page to try the server with. Its data needs an API key where one is "
        "asked for.",
    )
    max_inflight: int = Field(256, ge=1, description="Requests accepted and unfinished at once; one more gets 429.")
    default_max_tokens: int = Field(
        2048,
        ge=1,
        description="Longest answer of a request that sets no limit; decode reserves KV for as much.",
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest request body.")
    request_timeout_s: float = Field(600.0, gt=0, description="Longest a request may take, end to end.")
    keepalive_s: float = Field(15.0, gt=0, description="An idle SSE stream sends a comment this often.")
    max_attempts: int = Field(2, ge=1, le=5, description="Workers tried for one request before its error is shown.")
    drain_s: float = Field(30.0, ge=0, description="On SIGTERM: how long running requests may still take.")


class WorkerSection(Section):
    host: str = Field("127.0.0.1", description="Address the gRPC server listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port of the gRPC server; 0 picks a free one.")
    advertise: str | None = Field(
        None, description="Address other workers reach this one at. Default: `POD_IP` or `host`, with the port."
    )
    worker_id: str | None = Field(None, description="Default: `POD_NAME`, else role and process id.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of `/metrics` and `/health/{startup,live,ready}`; 0 picks a free one, none when unset.",
    )
    attention: str = Field(
        "auto",
        description="Attention backend: `cpu` (native kernels, compiled at the first start), `flashinfer` (GPUs), "
        "`sdpa` (torch), or `reference` (slow, for comparison). `auto`: `cpu` on CPUs where it can be compiled, "
        "`flashinfer` on GPUs where it is installed and has a kernel for the model, else `sdpa`.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one step. Default: torch's own choice.")
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes among which the model is divided, by attention head: on `cuda` one per GPU, from "
        "`model.device` on. A divisor of the KV heads. Prefill and decode workers may differ. Not in `packlight "
        "serve`.",
    )
    rank_timeout_s: float = Field(
        60.0,
        gt=0,
        description="With `tensor_parallel` above 1: how long one rank may keep the others waiting inside a step. Then "
        "the step fails and the worker ends, because a part of the model is missing.",
    )
    kv_memory_bytes: int = Field(1 << 30, ge=1 << 16, description="Memory of the KV pool, of all ranks together.")
    max_queue: int = Field(64, ge=1, description="Requests waiting for admission; one more is refused.")
    drain_s: float = Field(30.0, ge=0, description="On SIGTERM: how long running requests may still take.")


class PrefillConfig(WorkerSection):
    chunk_tokens: int = Field(512, ge=1, description="Tokens prefilled in one step, over all prompts in the step.")
    max_prompts: int = Field(8, ge=1, description="Prompts in one step.")
    shadow_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of packed requests whose next-token distribution is also computed from packed KV and "
        "compared with the exact one, for the `shadow` metrics. Each costs one step of one token. None are with "
        "`tensor_parallel` above 1.",
    )


class LocalPrefillConfig(Section):
    kv_memory_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Memory for the exact KV of prompts that a decode worker prefills itself: short ones, and all that "
        "fit while there is no prefill worker. 0: it prefills nothing. No part of `packlight serve`.",
    )


class GraphsConfig(Section):
    batch_sizes: list[PositiveInt] = Field(
        [1, 2, 4, 8, 16],
        description="Decode steps with so many requests are captured as CUDA graphs at start, a smaller batch being "
        "padded. With `flashinfer` only. Empty: no graphs.",
    )
    tokens: list[PositiveInt] = Field(
        [4096, 32_768],
        description="For each batch size: steps in which no KV head holds more tokens. Longer ones run eagerly.",
    )
    recipes: list[str] = Field(
        ["rocketkv"], description="Recipes that read some pages only whose steps are captured too."
    )
    read_tokens: int = Field(1024, ge=1, description="Most tokens per KV head that such a captured step reads.")


class DecodeConfig(WorkerSection):
    kv_memory_bytes: int = Field(2 << 30, ge=1 << 16, description="Memory of the KV pool.")
    max_batch: int = Field(16, ge=1, description="Requests that decode together in one step.")
    kv_codec: str = Field(
        "native",
        description="How packed KV lies in memory: `native` (the model's dtype), `fp8_unscaled` (FP8 numbers, which "
        "FlashInfer reads in place), or a codec of docs/recipes.md (`fp8`, `int8`, `int4`, ...), which holds more of "
        "it and is decoded at every read.",
    )
    transports: list[str] = Field(
        ["inproc", "shm", "grpc"],
        min_length=1,
        description="KV transports this worker accepts, best first: `inproc` (one process), `shm` (processes of one "
        "host and user that see each other in /proc), `grpc` (always works). The first that both ends can use is used. "
        "Before `grpc`, add `nixl` where hosts share an RDMA network and both ends have NIXL, or `process_group` "
        "(torch.distributed: NCCL between GPUs, else Gloo) where they do not but the network is fast. Both listen on "
        "free ports of `host`, and what they cannot carry goes through the stream.",
    )
    staging_bytes: int = Field(
        256 << 20, ge=2 << 20, description="Memory that `nixl` registers to receive into, if it is among `transports`."
    )
    prefill_timeout_s: float = Field(
        60.0, gt=0, description="Longest silence of a prefill worker before the request is tried elsewhere."
    )
    local_prefill: LocalPrefillConfig = LocalPrefillConfig()
    max_stall_s: float = Field(
        0.2,
        gt=0,
        description="While requests decode, a prefill step on the same cores is cut to what takes this long (four "
        "pages at least), so that the tokens of an answer come that much later at most. Smaller: smoother; larger: "
        "faster prefill.",
    )
    graphs: GraphsConfig = GraphsConfig()


class IndexConfig(Section):
    backend: str = Field("memory", description="`memory` (one process) or `redis` (a fleet).")
    redis_url: str | None = Field(None, description="Default: `REDIS_URL`.")
    timeout_s: float = Field(
        0.02,
        gt=0,
        description="No request waits longer than this on Redis, connecting included: with `rediss://`, or a server "
        "several milliseconds away, give it 0.1.",
    )
    breaker_s: float = Field(1.0, gt=0, description="After a failure Redis is left alone for this long.")
    max_nodes: int = Field(100_000, ge=100, description="Radix nodes kept per model; the least recently used go first.")


class FleetConfig(Section):
    backend: str = Field("memory", description="`memory` (one process) or `redis`.")
    heartbeat_s: float = Field(1.0, gt=0, description="How often a worker reports.")
    ttl_s: float = Field(5.0, gt=0, description="A worker silent for this long is dead.")


PLAIN_TRANSPORTS = ("process_group", "nixl")
"""KV transports with connections of their own, which gRPC's TLS does not cover."""


class TlsConfig(Section):
    ca: str | None = Field(
        None,
        min_length=1,
        description="File of the CA certificates that vouch for the fleet's members. With `cert` and `key`, traffic "
        "between router and workers is encrypted, and each end shows the other a certificate. All processes of a "
        "fleet have it or none has. The three files are read again when they change. No part of `packlight serve`.",
    )
    cert: str | None = Field(
        None,
        min_length=1,
        description="File of this process's certificate, for both ends of a call, with what is between it and `ca`.",
    )
    key: str | None = Field(None, min_length=1, description="File of the certificate's key, unencrypted.")
    name: str = Field(
        "packlight",
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="DNS name that makes a certificate one of this fleet: every certificate has it, whatever the host.",
    )
    allow_plain_transports: bool = Field(
        False,
        description="Let `process_group` and `nixl` move KV although TLS does not cover them: where their network is "
        "the workers' own.",
    )

    @property
    def is_on(self) -> bool:
        return self.ca is not None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        files = {"ca": self.ca, "cert": self.cert, "key": self.key}
        missing = [f"tls.{name}" for name, path in files.items() if path is None]
        if 0 < len(missing) < len(files):
            raise ValueError(f"without {' and '.join(missing)}: set tls.ca, tls.cert and tls.key, or none of them")
        return self


class TelemetryConfig(Section):
    traces: Literal["none", "otlp"] = Field(
        "none",
        description="Where spans of requests go: nowhere, or by OTLP over gRPC to an OpenTelemetry collector "
        "(`pip install 'packlight[traces]'`).",
    )
    traces_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="The collector: `http://host:4317`, or `https://` for TLS. Default: `OTEL_EXPORTER_OTLP_ENDPOINT`, "
        "else `http://localhost:4317`.",
    )
    traces_sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of requests that are traced, of those whose caller has not decided (by a `traceparent`).",
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    kv: KVConfig = KVConfig()
    router: RouterConfig = RouterConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    index: IndexConfig = IndexConfig()
    fleet: FleetConfig = FleetConfig()
    tls: TlsConfig = TlsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="Least severe level that is logged."
    )
    log_format: Literal["pretty", "json"] = Field(
        "pretty", description="`pretty`: lines for people; `json`: an object a line, for a log collector."
    )

    @model_validator(mode="after")
    def _heard_before_given_up(self) -> Self:
        if self.fleet.heartbeat_s >= self.fleet.ttl_s:
            raise ValueError(
                f"fleet.heartbeat_s: got {self.fleet.heartbeat_s:g}, must be less than fleet.ttl_s, which is "
                f"{self.fleet.ttl_s:g}, or every worker is dead between two reports. A fifth of it is usual"
            )
        return self

    @model_validator(mode="after")
    def _nothing_in_the_clear_unasked(self) -> Self:
        plain = [name for name in self.decode.transports if name in PLAIN_TRANSPORTS]
        if self.tls.is_on and plain and not self.tls.allow_plain_transports:
            raise ValueError(
                f"decode.transports names {' and '.join(plain)}, which TLS does not cover: KV would travel in the "
                "clear. Leave it out, or set tls.allow_plain_transports=true if its network is the workers' own"
            )
        return self
