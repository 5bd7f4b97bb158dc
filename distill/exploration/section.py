"""The `[explore]` table of a recipe: inputs beside the data that the teacher labels. Imports only pydantic.

| kind | the further inputs |
|---|---|
| `none` | there are none |
| `random` | near real ones, sampled in a generator's latent space; texts: masked tokens refilled (TGT) |
| `gradient` | near real ones, where student and teacher disagree most (TGT) |
| `reconstructed` | control: what the generator makes of real ones without a step, Dec(Enc(x)) |
| `augmented` | control: real ones under strong augmentation, without a generator |
| `real` | control: real ones as they are; with `around = "unlabelled"`, plain distillation on unlabelled data |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from profiles.section import Arguments, Section, Unfit

ExploreKind = Literal["none", "random", "gradient", "reconstructed", "augmented", "real"]
GeneratorKind = Literal["vae", "torch", "masked-lm"]
Around = Literal["train", "unlabelled", "both"]
GENERATED: frozenset[str] = frozenset({"random", "gradient", "reconstructed"})
"""Kinds whose inputs a generator makes."""
CONTROLS: frozenset[str] = frozenset({"reconstructed", "augmented", "real"})
"""Kinds that are there to be compared with."""
SMALLEST_KEEP_RATE = 0.05
"""A filter that keeps less than this share leaves nothing to learn from."""
KEPT = "explore/kept"
"""The figure of the metrics with the share that a filter kept; by class below it."""
_WORST, _NAMED = 3, 8
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, lt=1)]


class GeneratorSection(Section):
    """What makes new inputs. It is frozen while a student learns.

    kind "vae": a convolutional variational autoencoder that edgestill trains on the images, labels unused.
    kind "torch": `factory` ("package.module:name") called with `kwargs`; a module with encode (images, float32 in 0..1,
      (N, C, H, W), to latents (N, ...)) and decode (latents to images in 0..1); `weights` (.safetensors or .pth).
    kind "masked-lm": texts; `model` is a local folder or a hub name of a masked language model. A folder without the
      head for it, such as a sentence encoder's, gets one with tied embeddings that edgestill trains (`learn`).
    """

    kind: GeneratorKind | None = Field(
        None,
        description="vae (trained here) or torch (your own) for images, masked-lm for texts; default: vae or masked-lm",
    )
    latent: int = Field(32, ge=1, le=4096, description="dimensions of the latent space of the VAE")
    width: int = Field(32, ge=4, le=512, description="channels of the VAE's first layer")
    beta: _Positive = Field(1.0, description="weight of the VAE's KL term; smaller: sharper images, rougher space")
    epochs: int | None = Field(
        None,
        ge=1,
        description="passes of the generator's own training over the inputs; default: 20 (vae), 3 (masked-lm)",
    )
    min_steps: int | None = Field(
        None,
        ge=1,
        description="at least so many steps of the generator's own training: few inputs get more passes for it; "
        "default: 500 for a VAE whose epochs are not named, else none",
    )
    batch_size: int | None = Field(
        None, ge=1, description="samples per step of the generator's own training; default: 128 (vae), 32 (masked-lm)"
    )
    learning_rate: _Positive | Literal["auto"] = Field(
        "auto", description="of the generator's own training, AdamW; auto: 0.002 (vae), 5e-4 (masked-lm)"
    )
    factory: str | None = Field(None, description='dotted path "package.module:name" of your own generator')
    kwargs: Arguments = Field(default_factory=dict, description="arguments of the factory")
    weights: str | None = Field(None, description="state dict of your own generator (.safetensors, .pth)")
    model: str | None = Field(None, description="folder or hub name of the masked language model")
    learn: Literal["auto", "nothing", "head", "all"] = Field(
        "auto",
        description="what of the masked language model is trained on the texts first: nothing, head, or all; auto: all "
        "where the model comes without a head for it, else nothing",
    )
    mask: tuple[_Share, _Share] = Field(
        (0.15, 0.3), description="smallest and largest share of a text's tokens that are masked and refilled"
    )
    temperature: _Positive = Field(1.0, description="of the distribution that a masked token is drawn from")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        if self.kind is not None:
            for name in given(self):
                if name not in KEYS_OF_GENERATOR[self.kind]:
                    owners = " or ".join(f'"{kind}"' for kind, keys in KEYS_OF_GENERATOR.items() if name in keys)
                    raise Unfit(
                        f'"{name}" does not belong to a generator of kind "{self.kind}"; '
                        f"its keys: {', '.join(sorted(KEYS_OF_GENERATOR[self.kind] - {'kind'}))}",
                        f"leave explore.generator.{name} out, or explore.generator.kind = {owners}",
                    )
        if self.kind == "torch" and self.factory is None:
            raise Unfit('a generator of kind "torch" needs "factory"', 'factory = "package.module:name"')
        if self.kind == "masked-lm" and self.model is None:
            raise Unfit('a generator of kind "masked-lm" needs "model"', 'model = "a folder or hub name"')
        if self.mask[0] > self.mask[1]:
            shown = f"mask = [{self.mask[0]:g}, {self.mask[1]:g}]"
            raise Unfit(f"{shown}: the smallest share first", f"mask = [{self.mask[1]:g}, {self.mask[0]:g}]")
        return self

    def passes(self, samples: int) -> int:
        """`epochs`, or the default of the kind, or as many more as `samples` inputs need for `min_steps`."""
        is_vae = self.model is None
        own = self.epochs or (20 if is_vae else 3)
        least = self.min_steps or (_MIN_STEPS if is_vae and self.epochs is None else 1)
        steps_per_epoch = samples // max(1, min(self.batch, samples)) or 1
        return max(own, -(-least // steps_per_epoch))

    @property
    def hashed(self) -> dict[str, Any]:
        """The values that a hash takes; `min_steps` only where it is given, so that keys of older versions hold."""
        return self.model_dump(mode="json", exclude={"min_steps"} if self.min_steps is None else None)

    @property
    def batch(self) -> int:
        """`batch_size`, or the default of the kind."""
        if self.batch_size is not None:
            return self.batch_size
        return 128 if self.model is None else 32


_MIN_STEPS = 500
_TRAINED = frozenset({"epochs", "min_steps", "batch_size", "learning_rate"})
KEYS_OF_GENERATOR: dict[GeneratorKind, frozenset[str]] = {
    "vae": frozenset({"kind", "latent", "width", "beta"}) | _TRAINED,
    "torch": frozenset({"kind", "factory", "kwargs", "weights"}),
    "masked-lm": frozenset({"kind", "model", "learn", "mask", "temperature"}) | _TRAINED,
}


class ExploreSection(Section):
    """Inputs beside the data on which the student learns from the teacher: their labels are the teacher's, always.

    In every step `batch_size` of them pass through the teacher as it is then (or were passed once, `versions`), and the
    student is pulled towards what the teacher says of them. The ground truth has no say there.
    """

    kind: ExploreKind = Field("none", description="where the further inputs come from")
    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="lambda_2, of the distillation loss on them; 0: looked at only"
    )
    match: Literal["kd", "objective"] | None = Field(
        None,
        description="kd: tau^2 KL of the class probabilities; objective: the recipe's own objectives; default: kd "
        "where the teacher gives class logits",
    )
    tau: _Positive | None = Field(None, description="temperature of match = kd; default: the recipe's kd's own, else 1")
    around: Around = Field("train", description="real inputs to explore around: train, unlabelled, or both together")
    batch_size: int | None = Field(
        None,
        ge=2,
        description="further inputs per step, at least 2 per process: their statistics normalise them; default: "
        "train.batch_size",
    )
    versions: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="make so many inputs of each real one once, ask the teacher once, and store both; default: new "
        "ones in every step",
    )
    sigma: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="radius, in standard deviations of the latents (random, gradient)"
    )
    steps: int = Field(1, ge=1, le=3, description="ascent steps of gradient exploration")
    filter: Literal["none", "confidence", "agreement"] = Field(
        "none",
        description="which inputs to keep: none drops nothing; confidence: those that the teacher is sure of "
        "(threshold); agreement: those that it calls as it calls the real input",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="smallest probability of the teacher's class (confidence)")
    generator: GeneratorSection = Field(GeneratorSection(), description="what makes the inputs")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        for name in given(self):
            if self.kind not in KINDS_OF_KEY.get(name, frozenset({self.kind})):
                wanted = " or ".join(f'"{kind}"' for kind in sorted(KINDS_OF_KEY[name]))
                kinds = ",".join([max(KINDS_OF_KEY[name] - CONTROLS), self.kind])
                raise Unfit(
                    f'"{name}" belongs to kind {wanted}, this one is "{self.kind}"',
                    f"leave explore.{name} out; or compare kinds, each with the keys that it has: "
                    f"edgestill study RECIPE --vary explore.kind={kinds}",
                )
        if self.filter != "confidence" and "threshold" in given(self):
            raise Unfit(
                '"threshold" belongs to filter = "confidence"',
                'explore.filter = "confidence", or leave explore.threshold out',
            )
        if self.match == "objective" and self.tau is not None:
            raise Unfit(
                '"tau" belongs to match = "kd"; an objective has its own',
                'explore.match = "kd", or leave explore.tau out',
            )
        if self.kind == "gradient" and self.sigma == 0:
            raise Unfit(
                "sigma = 0 leaves nothing to explore",
                'explore.sigma above 0; explore.kind = "reconstructed" is that control',
            )
        if self.kind == "gradient" and self.generator.kind == "masked-lm":
            raise Unfit("texts have no gradient to follow", 'explore.kind = "random", which refills masked tokens')
        return self

    @property
    def generates(self) -> bool:
        """Whether a generator makes the inputs."""
        return self.kind in GENERATED

    @property
    def hashed(self) -> dict[str, Any]:
        """The values that a hash takes."""
        return {**self.model_dump(mode="json"), "generator": self.generator.hashed}


_ALL_BUT_NONE: frozenset[str] = frozenset({"random", "gradient", "reconstructed", "augmented", "real"})
KINDS_OF_KEY: dict[str, frozenset[str]] = {
    **dict.fromkeys(("weight", "match", "tau", "around", "batch_size", "filter", "threshold"), _ALL_BUT_NONE),
    "versions": _ALL_BUT_NONE - {"gradient"},
    "sigma": frozenset({"random", "gradient"}),
    "steps": frozenset({"gradient"}),
    "generator": GENERATED,
}
"""Keys that only some kinds read."""


_FORMER: dict[str, Any] = {"sigma": 1.0}
"""Former defaults, which recipes that were stored then spell out."""


def given(section: Section) -> list[str]:
    """Keys whose values differ from the default; a stored recipe spells every default out."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) not in (field.get_default(call_default_factory=True), _FORMER.get(name))
    ]


def least_kept(rates: Mapping[str, float]) -> str:
    """ "least of Shirt: 41 %, Coat: 50 %": the classes that lost most to a filter. rates: shares kept, by class."""
    worst = sorted(rates.items(), key=lambda entry: entry[1])[:_WORST]
    return f"least of {', '.join(f'{name}: {100 * rate:.0f} %' for name, rate in worst)}"


def starved_classes(rates: Mapping[str, float]) -> str:
    """ "less than 5 % is kept of Shirt, ...": the classes of which a filter leaves too little; empty without any."""
    names = [name for name, rate in rates.items() if rate < SMALLEST_KEEP_RATE]
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    listed = ", ".join(names[:_NAMED]) + more
    return f"less than {100 * SMALLEST_KEEP_RATE:.0f} % is kept of {listed}, too little to learn from"


class ExploreParameter(Section):
    """One key of `[explore]`, by its place below it."""

    name: str
    default: str | float | bool | tuple[float, ...] | dict[str, Any] | None
    meaning: str


class ExploreDescription(Section):
    """What `edgestill methods` says about one exploration."""

    kind: ExploreKind
    title: str
    summary: str
    needs: str
    cost: str
    source: str
    control: bool
    parameters: tuple[ExploreParameter, ...]


_TGT = "Zaheer et al. 2022, arXiv 2208.06825"
_TEACHER = "a teacher that can be run on any input (not array)"
_FACTS: dict[ExploreKind, tuple[str, str, str, str, str]] = {
    "none": ("Real data only", "the student learns on the training split alone", "nothing", "none", "-"),
    "random": (
        "Teacher-guided training, random (TGT)",
        "samples a generator's latent space near real inputs and lets the teacher label what comes out; texts: masked "
        "tokens are refilled",
        f"{_TEACHER}, and a generator: a VAE or masked language model that is trained on unlabelled inputs, or yours",
        "the generator's training once; in every step a pass of generator, teacher and student (versions: stored)",
        f"{_TGT}; radius and filters are our reading",
    ),
    "gradient": (
        "Teacher-guided training, gradient (TGT)",
        "as random, and steps in latent space towards where student and teacher disagree, up to the same radius",
        "as random, for images, with a teacher of kind train, torch or transformers",
        "as random, and in every step so many times forward and backward through generator, teacher and student",
        f"{_TGT}; steps and projection are our reading",
    ),
    "reconstructed": (
        "Distillation on reconstructions",
        "the generator's picture of real inputs, without a step: what the generator alone does",
        "as random, for images",
        "as random",
        "control of TGT",
    ),
    "augmented": (
        "Distillation on strong augmentation",
        "real images shifted, mirrored, erased and changed in contrast, labelled by the teacher",
        f"{_TEACHER}, and images",
        "in every step a pass of teacher and student",
        "control of TGT",
    ),
    "real": (
        "Distillation on further real inputs",
        "real inputs as they are, labelled by the teacher: with unlabelled data the first thing to try",
        _TEACHER,
        "in every step a pass of teacher and student",
        "control of TGT",
    ),
}
"""Title, summary, needs, cost, source."""


def describe_explorations() -> tuple[ExploreDescription, ...]:
    """Every exploration with its settings; defaults and meanings come from the recipe's own fields."""
    return tuple(
        ExploreDescription(
            kind=kind,
            title=title,
            summary=summary,
            needs=needs,
            cost=cost,
            source=source,
            control=kind in CONTROLS,
            parameters=_parameters(kind),
        )
        for kind, (title, summary, needs, cost, source) in _FACTS.items()
    )


def _parameters(kind: ExploreKind) -> tuple[ExploreParameter, ...]:
    names = [name for name in ExploreSection.model_fields if kind in KINDS_OF_KEY.get(name, frozenset())]
    found = [_parameter(name, ExploreSection, name) for name in names if name != "generator"]
    if "generator" in names:
        unread = _OF_TEXTS if kind in _OF_IMAGES else frozenset()
        found += [
            _parameter(f"generator.{name}", GeneratorSection, name)
            for name in GeneratorSection.model_fields
            if name not in unread
        ]
    return tuple(found)


_OF_IMAGES: frozenset[str] = frozenset({"gradient", "reconstructed"})
_OF_TEXTS = KEYS_OF_GENERATOR["masked-lm"] - KEYS_OF_GENERATOR["vae"] - KEYS_OF_GENERATOR["torch"]
"""Keys of a generator that kinds which images alone have never read."""


def _parameter(name: str, section: type[Section], field: str) -> ExploreParameter:
    found = section.model_fields[field]
    return ExploreParameter(
        name=name, default=found.get_default(call_default_factory=True), meaning=found.description or ""
    )
