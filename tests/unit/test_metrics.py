from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from functools import partial

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from packlight.core.types import KVUsage, Timings
from packlight.telemetry.catalogue import CATALOGUE, Kind, catalogue_markdown, full_name
from packlight.telemetry.logs import log_event, set_up_logging
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics, ProcessMetrics, RouterMetrics


def use_everything(registry: CollectorRegistry) -> None:
    """Calls every method of every role once."""
    router, prefill, decode = RouterMetrics(registry), PrefillMetrics(registry), DecodeMetrics(registry)
    for role in CATALOGUE:
        ProcessMetrics(role, registry).follow_certificate(lambda: 1.8e9)
    router.request_started("chat")
    router.request_ended("chat", "completed", 0.5)
    router.count_error("QueueFull")
    router.count_retry("WorkerLost")
    router.count_ignored(1)
    router.count_auto("snapkv")
    router.count_prompt(10)
    router.count_cached(4)
    router.count_generated(7)
    router.observe_first_token(0.1)
    router.observe_per_token(0.002)
    router.observe_prepare(0.001)
    router.observe_route(0.001)
    router.observe_timings(Timings(prefill_s=0.2))
    router.observe_kv(KVUsage("snapkv", 100.0, 1000, 4000, 0.98))
    router.set_workers("decode", 2)
    router.set_index_available(True)
    router.set_draining(False)
    router.set_ready(True)
    router.count_placement("local", "short")
    router.observe_prediction("local", 0.1, 0.12)
    for worker in (prefill, decode):
        worker.count_request("completed")
        worker.count_error("QueueFull")
        worker.set_pages(free=5, held=3, cached=2)
        worker.set_queue(1)
        worker.set_running(2)
        worker.observe_queue(0.01)
        worker.count_link("nixl", "made")
        worker.observe_shipment("snapkv", 100.0, 1000, 4000, 0.98)
    prefill.observe_prefill(100, 60, 0.2, 0.01)
    prefill.observe_step(2, 512, 0.05)
    prefill.observe_shipping("grpc", 0.2, 0.01)
    prefill.count_layers("nixl", 3, 27)
    prefill.observe_shadow("snapkv", 0.02, True)
    decode.observe_step(8, 0.004)
    decode.observe_transfer(0.01)
    decode.observe_first_step(0.005)
    decode.observe_stall(0.1)
    decode.set_link_pace("prefill-0", "nixl", 1e9)
    decode.count_graph_step("replayed")


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    use_everything(registry)
    return registry


def test_everything_in_the_catalogue_is_measured_and_nothing_else(registry: CollectorRegistry) -> None:
    parsed = text_string_to_metric_families(generate_latest(registry).decode())
    families = {family.name: family for family in parsed if not family.name.endswith("_created")}
    expected = {full_name(role, metric): metric for role, metrics in CATALOGUE.items() for metric in metrics}
    assert families.keys() == expected.keys()
    for name, metric in expected.items():
        assert families[name].type == metric.kind
        # Every child was touched: a labelled metric that nobody observes has no samples.
        samples = families[name].samples
        assert samples, name
        assert set(samples[0].labels) - {"le"} == set(metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            assert sum(sample.value for sample in samples if sample.name.endswith("_count")) > 0, name


def test_values(registry: CollectorRegistry) -> None:
    value = registry.get_sample_value
    assert value("packlight_router_requests_total", {"endpoint": "chat", "outcome": "completed"}) == 1
    assert value("packlight_router_inflight_requests", {"endpoint": "chat"}) == 0
    assert value("packlight_prefill_pages", {"state": "held"}) == 3
    assert value("packlight_decode_batch_size_sum") == 8
    assert value("packlight_decode_generated_tokens_total") == 8
    assert value("packlight_prefill_compression_ratio_sum", {"recipe": "snapkv"}) == 4
    assert value("packlight_router_time_to_first_token_part_seconds_sum", {"part": "prefill"}) == pytest.approx(0.2)
    assert value("packlight_router_time_per_output_token_seconds_bucket", {"le": "0.002"}) == 1
    assert value("packlight_router_time_per_output_token_seconds_bucket", {"le": "0.001"}) == 0


def test_nothing_shipped_has_no_ratio_and_no_mass() -> None:
    registry = CollectorRegistry()
    DecodeMetrics(registry).observe_shipment("none", 100.0, 0, 4000, None)
    assert registry.get_sample_value("packlight_decode_compression_ratio_count", {"recipe": "none"}) is None
    assert registry.get_sample_value("packlight_decode_attention_mass_retained_count", {"recipe": "none"}) is None


def test_errors_count_from_zero() -> None:
    """A series that begins with 1 has no increase: the first corrupt shipment would go unnoticed."""
    registry = CollectorRegistry()
    RouterMetrics(registry), DecodeMetrics(registry)
    assert registry.get_sample_value("packlight_decode_errors_total", {"type": "ShipmentCorrupt"}) == 0
    assert registry.get_sample_value("packlight_router_retries_total", {"type": "WorkerLost"}) == 0
    assert registry.get_sample_value("packlight_router_retries_total", {"type": "InvalidRequest"}) is None


def test_shadows_of_one_kind_are_a_share_of_both() -> None:
    """Where no shadow agrees, a panel that divides by the sum would have nothing to divide."""
    registry = CollectorRegistry()
    PrefillMetrics(registry).observe_shadow("h2o", 0.5, False)
    name = "packlight_prefill_shadow_tokens_total"
    found = {same: registry.get_sample_value(name, {"recipe": "h2o", "same": same}) for same in ("yes", "no")}
    assert found == {"yes": 0.0, "no": 1.0}


def test_the_oldest_in_the_queue_is_a_point_in_time() -> None:
    registry = CollectorRegistry()
    metrics = DecodeMetrics(registry, wall_clock=lambda: 1000.0)
    oldest = partial(registry.get_sample_value, "packlight_decode_oldest_queued_timestamp_seconds")
    metrics.set_queue(2, oldest_wait_s=30.0)
    assert oldest() == 970
    metrics.set_queue(0)
    assert oldest() == 0


def test_two_engines_live_in_one_process() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    DecodeMetrics(first).set_queue(5)
    DecodeMetrics(second)
    assert first.get_sample_value("packlight_decode_queued_requests") == 5
    assert second.get_sample_value("packlight_decode_queued_requests") == 0


@pytest.mark.parametrize("role", CATALOGUE)
def test_names_follow_the_conventions(role: str) -> None:
    for metric in CATALOGUE[role]:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
        assert metric.help.endswith(".")
        assert metric.buckets == tuple(sorted(set(metric.buckets)))
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert not metric.name.endswith("_total")


def test_every_metric_is_documented() -> None:
    text = catalogue_markdown()
    assert all(f"`{full_name(role, metric)}" in text for role, metrics in CATALOGUE.items() for metric in metrics)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    set_up_logging("info", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_event_is_one_line(log: io.StringIO) -> None:
    logging.getLogger("packlight.x").info("two\nlines\r and a \\")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("packlight.x").exception("failed")
    logging.getLogger("packlight.x").debug("not shown")
    first, second = log.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO packlight\.x two\\nlines\\r and a \\\\", first)
    assert "Traceback" in second
    assert second.endswith("ValueError: broken")


def test_facts_follow_the_event(log: io.StringIO) -> None:
    log_event(logging.getLogger("packlight.x"), logging.INFO, "100 % chat", request="r-1", seconds=0.5, forged="a\nb")
    assert log.getvalue().endswith("INFO packlight.x 100 % chat request=r-1 seconds=0.5 forged=a\\nb\n")


def test_facts_come_before_a_traceback(log: io.StringIO) -> None:
    log_event(logging.getLogger("packlight.x"), logging.ERROR, "failed", exc_info=ValueError("x"), answers="a b")
    (line,) = log.getvalue().splitlines()
    assert re.search(r"failed answers=a b\\nValueError: x$", line)


def test_json_is_an_object_a_line(log: io.StringIO) -> None:
    set_up_logging("info", log, format="json")
    logger = logging.getLogger("packlight.x")
    logger.warning("%d\nlines", 2)
    log_event(logger, logging.ERROR, "chat", exc_info=ValueError("x"), request="r-1", outcome=Kind.GAUGE, level="fake")
    first, second = map(json.loads, log.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {"level": "warning", "logger": "packlight.x", "message": "2\nlines"}
    assert (second["message"], second["request"], second["outcome"]) == ("chat", "r-1", "gauge")
    assert second["level"] == "error"
    assert second["traceback"].endswith("ValueError: x")


def test_setting_up_again_replaces(log: io.StringIO) -> None:
    later = io.StringIO()
    set_up_logging("error", later)
    logging.getLogger("packlight.x").error("once")
    assert log.getvalue() == ""
    assert later.getvalue().count("once") == 1
