"""The languages lingraft knows by name, and each data set's own code for them.

Languages are data: a new one is a row. A task on the user's own files may use any code at all; this table is
asked only where a data set spells languages in its own way.
"""

from dataclasses import dataclass

from lingraft.errors import UserError, suggestion


@dataclass(frozen=True)
class Language:
    """A language: its ISO 639 code, English name and FLORES code (ISO 639-3 and script; so written for those FLORES lacks too)."""

    code: str
    name: str
    flores: str


_ROWS = """
ace Acehnese ace_Latn|am Amharic amh_Ethi|ar Arabic arb_Arab|az Azerbaijani azj_Latn|ban Balinese ban_Latn
bbc Toba_Batak bbc_Latn|bg Bulgarian bul_Cyrl|bjn Banjarese bjn_Latn|bn Bengali ben_Beng|bug Buginese bug_Latn
cy Welsh cym_Latn|de German deu_Latn|el Greek ell_Grek|en English eng_Latn|es Spanish spa_Latn
et Estonian est_Latn|eu Basque eus_Latn|fa Persian pes_Arab|fi Finnish fin_Latn|fr French fra_Latn
gd Scottish_Gaelic gla_Latn|gu Gujarati guj_Gujr|ha Hausa hau_Latn|hi Hindi hin_Deva
ht Haitian_Creole hat_Latn|id Indonesian ind_Latn|ig Igbo ibo_Latn|it Italian ita_Latn|ja Japanese jpn_Jpan
jv Javanese jav_Latn|km Khmer khm_Khmr|ko Korean kor_Hang|ky Kyrgyz kir_Cyrl|lo Lao lao_Laoo
mad Madurese mad_Latn|min Minangkabau min_Latn|mr Marathi mar_Deva|my Burmese mya_Mymr|ne Nepali npi_Deva
nij Ngaju nij_Latn|om Oromo gaz_Latn|pa Punjabi pan_Guru|pcm Nigerian_Pidgin pcm_Latn|ps Pashto pbt_Arab
pt Portuguese por_Latn|qu Quechua quy_Latn|rn Kirundi run_Latn|ro Romanian ron_Latn|ru Russian rus_Cyrl
rw Kinyarwanda kin_Latn|si Sinhala sin_Sinh|so Somali som_Latn|sr Serbian srp_Cyrl|su Sundanese sun_Latn
sw Swahili swh_Latn|ta Tamil tam_Taml|te Telugu tel_Telu|th Thai tha_Thai|ti Tigrinya tir_Ethi
tl Tagalog tgl_Latn|tr Turkish tur_Latn|uk Ukrainian ukr_Cyrl|ur Urdu urd_Arab|uz Uzbek uzn_Latn
vi Vietnamese vie_Latn|wo Wolof wol_Latn|xh Xhosa xho_Latn|yo Yoruba yor_Latn|zh Chinese zho_Hans
zu Zulu zul_Latn
"""


def _table() -> dict[str, Language]:
    rows = (row.split() for line in _ROWS.split("\n") for row in line.split("|") if row)
    return {code: Language(code, name.replace("_", " "), flores) for code, name, flores in rows}


LANGUAGES = _table()


def language(code: str) -> Language:
    """The row of a language.

    Raises:
        UserError: The code is not in the table.
    """
    try:
        return LANGUAGES[code]
    except KeyError:
        raise UserError(f"unknown language '{code}'", remedy=suggestion(code, LANGUAGES)) from None


def name_of(code: str) -> str:
    """The English name of a language, or its code where the table has no row."""
    return LANGUAGES[code].name if code in LANGUAGES else code
