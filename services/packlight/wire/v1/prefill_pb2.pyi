from packlight.wire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "num_prompt_tokens", "sampling", "pack", "cache_salt", "transports", "banned_token_ids", "deadline_s", "explain")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PACK_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    BANNED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    num_prompt_tokens: int
    sampling: _common_pb2.Sampling
    pack: _common_pb2.PackSpec
    cache_salt: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    banned_token_ids: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    explain: bool
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., pack: _Optional[_Union[_common_pb2.PackSpec, _Mapping]] = ..., cache_salt: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., banned_token_ids: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ..., explain: bool = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("accepted", "layer", "first_token", "shipped", "chunk", "waiting")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    layer: LayerHeader
    first_token: FirstToken
    shipped: Shipped
    chunk: bytes
    waiting: Waiting
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., layer: _Optional[_Union[LayerHeader, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., shipped: _Optional[_Union[Shipped, _Mapping]] = ..., chunk: _Optional[bytes] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("compatibility", "manifest")
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    compatibility: str
    manifest: bytes
    def __init__(self, compatibility: _Optional[str] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class LayerHeader(_message.Message):
    __slots__ = ("layer", "lengths", "num_bytes", "checksum", "offset")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    layer: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    checksum: int
    offset: int
    def __init__(self, layer: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "num_cached_tokens")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token: _common_pb2.Token
    num_cached_tokens: int
    def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class Shipped(_message.Message):
    __slots__ = ("num_layers", "shipped_bytes", "exact_bytes", "num_kept_tokens", "retained_mass", "queue_s", "prefill_s", "select_s", "num_grown_tokens", "kept_map", "ship_s")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXACT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_MASS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    SELECT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_GROWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_MAP_FIELD_NUMBER: _ClassVar[int]
    SHIP_S_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    shipped_bytes: int
    exact_bytes: int
    num_kept_tokens: float
    retained_mass: float
    queue_s: float
    prefill_s: float
    select_s: float
    num_grown_tokens: float
    kept_map: _common_pb2.KeptMap
    ship_s: float
    def __init__(self, num_layers: _Optional[int] = ..., shipped_bytes: _Optional[int] = ..., exact_bytes: _Optional[int] = ..., num_kept_tokens: _Optional[float] = ..., retained_mass: _Optional[float] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., select_s: _Optional[float] = ..., num_grown_tokens: _Optional[float] = ..., kept_map: _Optional[_Union[_common_pb2.KeptMap, _Mapping]] = ..., ship_s: _Optional[float] = ...) -> None: ...
