"""The YAML at the head of a card: what the Hub reads to list, filter and show a model."""

from __future__ import annotations

import difflib
import re
from typing import Any

from dinokit.card.facts import HUB_MODELS, CardFacts
from dinokit.card.measured import at_k
from dinokit.loading.zoo import DINOV3_LICENCE, DINOV3_LICENCE_URL

__all__ = [
    "LICENCE_LINKS",
    "base_model",
    "known_datasets",
    "licence_metadata",
    "metadata",
    "unlisted_licence",
    "yaml_head",
]

TASK = "image-feature-extraction"

LICENCE_LINKS = {
    DINOV3_LICENCE: DINOV3_LICENCE_URL,
    "fair-noncommercial-research-license": "https://huggingface.co/facebook/fair-noncommercial-research-license",
}
"""Links to licences that the Hub has no page for."""

# The Hub's identifiers of licences (its documentation, "Licenses"), without those of single models' owners. Another
# name is written as "license: other" with "license_name".
_HUB_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
lgpl-lr lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl unknown
"""


def yaml_head(facts: CardFacts) -> str:
    """The metadata between its two lines ``---``, with a line break at the end."""
    import yaml

    text = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The content of the YAML, in order."""
    datasets = list(facts.settings.datasets) or known_datasets(facts)
    base = base_model(facts)
    values: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": TASK,
        **licence_metadata(facts.config.licence),
        "tags": _tags(facts),
        **({"datasets": datasets} if datasets else {}),
        **({"base_model": base} if base else {}),
    }
    results = _results(facts)
    if results:
        values["model-index"] = [{"name": facts.config.name, "results": results}]
    return values


def licence_metadata(licence: str) -> dict[str, str]:
    """The licence's keys: its identifier if the Hub knows it, else its name and, if known, a link."""
    if licence in _HUB_LICENCES.split():
        return {"license": licence}
    if licence in ("", "other"):
        return {"license": "other"}
    link = LICENCE_LINKS.get(licence)
    return {"license": "other", "license_name": licence, **({"license_link": link} if link else {})}


def unlisted_licence(licence: str) -> str | None:
    """A warning with similar names if the Hub does not list this licence; None if it does, or for "other".

    A custom licence may have any name, so this is not an error.
    """
    if licence == "other" or licence in LICENCE_LINKS or licence in _HUB_LICENCES.split():
        return None
    plain = "-".join(licence.lower().split())
    near = difflib.get_close_matches(plain, _HUB_LICENCES.split(), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"the Hub has no licence {licence!r}; the card will have license: other, license_name: {licence}.{hint}"


def base_model(facts: CardFacts) -> str | None:
    """The repository on the Hub that weights were converted from, unless they were trained since."""
    source = facts.config.source
    return source if facts.record is None and HUB_MODELS.fullmatch(source) else None


def known_datasets(facts: CardFacts) -> list[str]:
    """Ids on the Hub of what published weights were trained on, where there is such a data set."""
    return ["imagenet-1k"] if re.fullmatch(r"timm/\w+\.dino", base_model(facts) or "") else []


def _tags(facts: CardFacts) -> list[str]:
    tags = [*([facts.method.lower(), "self-supervised"] if facts.method else []), "dinokit"]
    if any(name.endswith(".onnx") for name in facts.files):
        tags.append("onnx")
    if facts.for_transformers:
        tags.append("transformers")
    if facts.for_transformers_js:
        tags.append("transformers.js")
    return tags


def _results(facts: CardFacts) -> list[dict[str, Any]]:
    """Results of these weights in percent: from `dinokit eval`, else measured during training."""
    results = []
    for entry in facts.measured:
        score = at_k(entry["knn"])
        how = "" if entry["protocol"] == "queries" else ", leave-one-out"
        name = f"k-NN top-1 (k={score['k']}, T={entry.get('temperature', 0.07):g}{how}), %"
        metrics = [_accuracy(name, score["top1"]["value"])]
        if entry.get("linear"):
            metrics.append(_accuracy("linear probe top-1, %", entry["linear"]["top1"]["value"]))
        results.append(_result(str(entry["set"]), metrics))
    run = (facts.record or {"runs": [{}]})["runs"][-1]
    name = run.get("labelled")
    if run.get("knn") and name and name not in {entry["set"] for entry in facts.measured}:
        how = "" if run.get("labelled_queries") else ", leave-one-out"
        share = run["knn"][-1]["knn_teacher"]
        results.append(_result(str(name), [_accuracy(f"k-NN top-1 (k=20, T=0.07{how}), %", share)]))
    return results


def _result(name: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    kind = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "local"
    return {
        "task": {"type": "image-classification", "name": "classification with frozen features"},
        "dataset": {"type": kind, "name": name},
        "metrics": metrics,
    }


def _accuracy(name: str, share: Any) -> dict[str, Any]:
    return {"type": "accuracy", "name": name, "value": round(100 * float(share), 2)}
