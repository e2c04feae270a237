"""The stages of the funnel by their names, the cheap ones first, in the order in which a recipe best has them.

A stage of your own is a class of options, a function that opens it and an entry: items.py says what these do.
"""

from nanovlm.data.build import agreement, checks, comparing, leakage
from nanovlm.data.build.items import Stage

STAGES = {
    "ratings": Stage(checks.RatingsOptions, checks.open_ratings),
    "text": Stage(checks.TextOptions, checks.open_text, shows_words=True),
    "corrupt": Stage(checks.CorruptOptions, checks.open_corrupt),
    "size": Stage(checks.SizeOptions, checks.open_size),
    "safety": Stage(checks.SafetyOptions, checks.open_safety, shows_words=True, digest=checks.digest_lists),
    "leakage": Stage(leakage.LeakageOptions, leakage.open_leakage, digest=leakage.digest_asked),
    "exact": Stage(comparing.ExactOptions, comparing.mark_exact, comparing.compare_exact),
    "near": Stage(comparing.NearOptions, comparing.mark_near, comparing.compare_near),
    "agreement": Stage(
        agreement.AgreementOptions,
        agreement.open_agreement,
        is_costly=True,
        shows_words=True,
        digest=agreement.digest_model,
    ),
    "alike": Stage(
        agreement.AlikeOptions,
        agreement.mark_alike,
        agreement.compare_alike,
        is_costly=True,
        digest=agreement.digest_model,
    ),
    "caps": Stage(comparing.CapsOptions, comparing.mark_caps, comparing.compare_caps),
}
