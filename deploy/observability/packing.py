"""The dashboard of what packing does: what it saves, and what it costs."""

from __future__ import annotations

from deploy.observability import promql
from deploy.observability.grafana import Dashboard, Kind, Panel, Query, Row, Unit

FLOOR = 0.8  # the default of `kv.policy.floor`, as in the alert
_SAVED = f"1 - {promql.rate('router', 'shipped_bytes')} / {promql.rate('router', 'exact_bytes')}"
_AGREEING = promql.rate("prefill", "shadow_tokens", same="yes")

BOUGHT = Row(
    "What does it save?",
    (
        Panel(
            "KV not shipped",
            "Share of the exact KV's bytes that decode neither received nor holds.",
            (Query(_SAVED),),
            Unit.SHARE,
            Kind.NUMBER,
            6,
        ),
        Panel(
            "Tokens kept",
            "Prompt tokens kept per KV head, mean over layers, heads and requests.",
            (Query(promql.mean("router", "kept_tokens")),),
            Unit.COUNT,
            Kind.NUMBER,
            6,
        ),
        Panel(
            "Attention mass kept",
            "Share of the window's attention that lies on kept tokens, mean over requests.",
            (Query(promql.mean("router", "attention_mass_retained")),),
            Unit.SHARE,
            Kind.NUMBER,
            6,
            limits=((None, "red"), (FLOOR, "green")),
        ),
        Panel(
            "Same next token",
            "Share of the sampled requests whose likeliest next token is the same from packed KV as from exact KV.",
            (Query(f"{_AGREEING} / {promql.rate('prefill', 'shadow_tokens')}"),),
            Unit.SHARE,
            Kind.NUMBER,
            6,
        ),
        Panel(
            "Bytes shipped",
            "KV on its way to decode, and what the exact KV of the same prompts takes.",
            (
                Query(promql.rate("router", "exact_bytes"), "exact"),
                Query(promql.rate("router", "shipped_bytes"), "shipped"),
            ),
            Unit.BYTES_A_SECOND,
        ),
        Panel(
            "Compression",
            "Exact bytes over shipped bytes of a prompt: the median, by recipe.",
            (Query(promql.quantile(0.5, "router", "compression_ratio", "recipe"), "{{recipe}}"),),
            Unit.COUNT,
        ),
        Panel(
            "Pages a running request holds",
            "Head pages on decode. With exact KV it grows with the prompt, with packed KV with what was kept of it.",
            (
                Query(
                    f"{promql.gauge('decode', 'pages', state='held')} / {promql.gauge('decode', 'running_requests')}",
                    "held",
                ),
            ),
            Unit.COUNT,
        ),
        Panel(
            "Recipes chosen by the policy",
            "Choices whose request left the recipe to `auto`.",
            (Query(promql.rate("router", "auto_recipes", "recipe"), "{{recipe}}"),),
            Unit.A_SECOND,
            is_stacked=True,
        ),
        Panel(
            "Recipes used",
            "Answers by recipe, whoever chose it.",
            (Query(promql.events("router", "kept_tokens", "recipe"), "{{recipe}}"),),
            Unit.A_SECOND,
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens found in a prefix cache",
            "Exact KV stays on prefill whatever was packed of it, so hits do not depend on recipes.",
            (Query(f"{promql.rate('router', 'cached_prompt_tokens')} / {promql.rate('router', 'prompt_tokens')}"),),
            Unit.SHARE,
        ),
    ),
)

COST = Row(
    "What does it cost?",
    (
        Panel(
            "Attention mass kept by 19 of 20 requests",
            "The 5th percentile, by recipe.",
            (Query(promql.quantile(0.05, "router", "attention_mass_retained", "recipe"), "{{recipe}}"),),
            Unit.SHARE,
        ),
        Panel(
            "Requests below the floor",
            f"Share of requests that kept less than {FLOOR:.0%} of the attention mass: the default floor of `auto`.",
            (Query(promql.share_up_to(FLOOR, "router", "attention_mass_retained", "recipe"), "{{recipe}}"),),
            Unit.SHARE,
        ),
        Panel(
            "Grown for the floor",
            "Tokens per KV head kept beyond the budget, because the budget alone would have been below the floor.",
            (Query(promql.mean("router", "grown_tokens", "recipe"), "{{recipe}}"),),
            Unit.COUNT,
        ),
        Panel(
            "Divergence of the next token",
            "Kullback-Leibler divergence of sampled requests, exact from packed, in nats.",
            tuple(
                Query(promql.quantile(q, "prefill", "shadow_kl_nats", "recipe"), f"{{{{recipe}}}} p{100 * q:g}")
                for q in (0.5, 0.95)
            ),
            Unit.NATS,
        ),
        Panel(
            "Other next token",
            "Share of sampled requests whose likeliest next token differs under packed KV, by recipe.",
            (
                Query(
                    f"1 - {promql.rate('prefill', 'shadow_tokens', 'recipe', same='yes')} / "
                    f"{promql.rate('prefill', 'shadow_tokens', 'recipe')}",
                    "{{recipe}}",
                ),
            ),
            Unit.SHARE,
        ),
        Panel(
            "Selection",
            "Share of prefill time that scoring, selecting and packing take.",
            (Query(f"{promql.total('prefill', 'select_seconds')} / {promql.total('prefill', 'prefill_seconds')}"),),
            Unit.SHARE,
        ),
    ),
)

PACKING = Dashboard(
    "packlight-packing",
    "Packlight: packing and fidelity",
    "What packing saves, and what it costs.",
    (BOUGHT, COST),
)
