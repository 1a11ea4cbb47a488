"""English words by their role in a prompt, by which vocabulary.py tells objects from everything else."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


PLURALS = {"mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "child": "children", "person": "people", "die": "dice"}
JOINTS = _set("and or & + plus")
BACKGROUNDS = _set("background backgrounds backdrop bg")
PHRASES = ("black and white", "out of focus", "close up", "line art", "clip art", "high quality", "low quality", "full body", "of course")
"""Phrases none of whose words is an object."""

DETERMINERS = _set("""
    a an the this that these those my your his her our their its some any every each another one two three four five six seven eight
    nine ten twelve dozen several many few both lots single only
""")
"""Words that introduce a noun."""
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "dozen": 12}
NUMBERS |= {"several": 7, "dozens": 24, "lots": 99, "many": 99, "hundred": 100, "hundreds": 200, "thousand": 999, "thousands": 999}
"""Numbers of things, in words, all below 1000; what has no number of its own has a high one."""
OTHER_COLOURS = _set("cyan magenta teal beige turquoise maroon indigo crimson scarlet aqua aquamarine fuchsia mauve burgundy transparent")
"""Words that nearly always name a colour, beside those that any model may know."""
REQUESTS = _set("""
    please can could would you i id im we want wanna need like love to see draw drawing paint sketch show give make create generate
    imagine render design illustrate me us let lets just hey hello hi a an the some
""")
"""Words with which a prompt may begin before it names what to draw."""
BOUNDARIES = _set("""
    on in at under underneath over above below beneath behind beside besides beyond near next by with without from to into onto inside
    outside through across around against between among along before after during while toward towards upon within amid up down off
    versus vs as like for who whose which that where when is are was were be has have had sits sat runs ran sleeps slept eats ate jumps
    flies flew plays smiles dances sings walks swims swam looks wears wore holds held stands stood drinks drank reads rides rode says
    waves laughs cries hugs kisses loves climbs chases yawns barks roars kicks made lying
""")
"""Words that end the noun phrase: a place, company or an action follows."""
CONTAINERS = _set("""
    photo photograph picture pic image drawing painting render rendering portrait closeup close shot view icon emoji logo sticker sketch
    illustration cartoon clipart symbol sign model version kind type sort style pair bunch group couple lot lots pile stack heap bowl
    cup glass plate bottle jar box bag basket can piece slice bit field set collection flock herd pack swarm school row bouquet bundle
    handful number top side front back middle center centre head face family team
""")
"""Nouns before "of" that are not the subject of a prompt."""
TAILS = _set("""
    face faces head heads animal animals character characters toy slice slices piece pieces cub cubs symbol sign figure shape shapes
    bird fish insect tree trees flower flowers plant fruit vegetable vehicle creature person lady home mascot avatar outline silhouette
    landscape scene scenery alone asleep awake outdoors outside inside again today forever here there away together up down
""")
"""Nouns and adverbs after a known object that do not change what it is: `lion cub`."""

_COLOURS = _set("""
    red orange yellow green blue purple violet pink brown black white gray grey gold golden silver navy lime colorful colourful colored
    coloured rainbow multicolored multicoloured light dark bright pale pastel neon
""")
_NUMBERS = _set("0 1 2 3 4 5 6 7 8 9 10 12 100 2d 3d 4k 8k hd uhd hdr")
_SIZES_AND_AGES = _set("""
    small little tiny mini big large huge giant gigantic enormous massive tall short long fat thin thick wide skinny chubby young old
    new ancient modern vintage retro baby
""")
_MEDIA = _set("""
    photo photograph photos picture pictures pic image images icon icons emoji emojis drawing drawings painting render rendering
    rendered cartoon cartoonish illustration illustrated sketch sticker clipart clip logo art artwork style styled styles design pixel
    vector watercolor watercolour anime realistic photorealistic minimalist minimalistic simple plain flat abstract detailed quality
    resolution high low best masterpiece professional stock wallpaper portrait closeup isolated centered centred kawaii chibi blurry
    blurred pixelated grainy noisy grayscale greyscale monochrome sharp crisp glossy shiny metallic transparent solid
""")
_QUALITIES = _set("""
    cute beautiful nice lovely pretty adorable cool funny happy friendly sweet sad angry scary spooky evil good bad great amazing
    awesome perfect gorgeous handsome ugly smiling laughing crying sleepy sleeping tired hungry grumpy silly crazy fluffy furry fuzzy
    soft round square wooden wild magic magical mystical fancy elegant royal rich poor strong brave proud lonely lazy fast slow hot cold
    warm fresh ripe delicious tasty yummy juicy open closed empty full broken haunted lucky famous favorite favourite real fake dirty
    clean wet dry smooth rough dead alive male female classic typical traditional ordinary normal regular random other same different
    super very really so too much more most extremely ultra quite please thanks thank now something anything thing things stuff look
    looking
""")
NO_OBJECTS = DETERMINERS | _COLOURS | _NUMBERS | _SIZES_AND_AGES | _MEDIA | _QUALITIES | OTHER_COLOURS | _set("and or of not no")
"""Words that are never the subject of a prompt."""
