"""The words that the PTB lexer knows: abbreviations, contractions, words with an apostrophe.

What Stanford's tokenizer 3.4.1 does, found by asking it for every string of up to five letters and
for the words, and beginnings of words, of a vocabulary of 200,000. Words in small letters are taken
in any case; a capital is required where one is written.
"""

# the full stop belongs to the token, whether or not it ends the sentence as well
ABBREVIATIONS = """
    al ala apr ariz Ark assn aug Az bancorp bhd bldg blvd bros calif co colo conn corp cos ct
    dak dec Del esq est etc ext feb fla fri ga Ill inc ind intl jan jr jul jun kan kans ky La
    ltd mar Mass md mich minn Miss mo mon mont neb nev nov oct okla Ore Pa penn ph\\.d plc rd rt
    sep sept seq sq sr sys tel tenn Tex thu thurs tue tues univ va vt Wash wed wis wisc wyo"""

# stand before a name, so never end a sentence
TITLES = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs
    elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl
    pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm"""

# abbreviations before a number only
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"

# after an initial, these begin a sentence
SENTENCE_STARTERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last
    Many More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then
    There These They This We What When While Yet You"""

# two tokens without anything between
JOINED = "can.not gon.na got.ta lem.me gim.me wan.na"

# kept whole besides those of a form (O'Brien, d'Arc, Hawai'i)
WITH_APOSTROPHE = "c'mon e'er ev'ry li'l nat'l nor'easter s'mores cont'd\\."
WITH_TYPESET_APOSTROPHE = "cap'n c'est"  # the curly one too
WITH_ANY_APOSTROPHE = "o'o"  # a backquote too

FILE_ENDINGS = """
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl
    png ppt ps py sql tar txt wav x xml zip"""
