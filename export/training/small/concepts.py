"""The everyday things that the embedded model can draw: what people call them, and which emoji shows them.

Knows names only; `emoji.py` turns them into pictures. A row is `name: emoji`, then other names that people use for it. The emoji is
named as in Noto's icon set, from which the code point follows.
"""

from dataclasses import dataclass

_TABLE = """
cat: cat-face, kitten
dog: dog-face, puppy
bear: bear
panda: panda
rabbit: rabbit-face, bunny
fox: fox
lion: lion
tiger: tiger-face
frog: frog
pig: pig-face
koala: koala
monkey: monkey-face
mouse: mouse-face
cow: cow-face
unicorn: unicorn
elephant: elephant
penguin: penguin
owl: owl
duck: duck
chick: front-facing-baby-chick
turtle: turtle, tortoise
fish: tropical-fish
whale: spouting-whale
octopus: octopus
crab: crab
snail: snail
butterfly: butterfly
bee: honeybee
ladybug: lady-beetle, ladybird
sunflower: sunflower
rose: rose
tulip: tulip
cactus: cactus
tree: deciduous-tree
palm tree: palm-tree
mushroom: mushroom, toadstool
four leaf clover: four-leaf-clover, clover
maple leaf: maple-leaf
apple: red-apple
banana: banana
strawberry: strawberry
cherries: cherries
grapes: grapes
lemon: lemon
orange: tangerine, tangerine
watermelon: watermelon
pineapple: pineapple
peach: peach
pear: pear
avocado: avocado
carrot: carrot
tomato: tomato
corn: ear-of-corn
broccoli: broccoli
hamburger: hamburger, burger
pizza: pizza, slice of pizza
hot dog: hot-dog
french fries: french-fries, fries
donut: doughnut, doughnut
cookie: cookie, biscuit
birthday cake: birthday-cake
cupcake: cupcake, muffin
ice cream: soft-ice-cream
lollipop: lollipop
fried egg: cooking
cheese: cheese-wedge
cup of coffee: hot-beverage, coffee
beer: beer-mug, glass of beer
soccer ball: soccer-ball, football
basketball: basketball
balloon: balloon
gift: wrapped-gift, present
christmas tree: christmas-tree
trophy: trophy
pumpkin: jack-o-lantern, jack o lantern
teddy bear: teddy-bear
car: automobile, automobile
bus: bus
fire truck: fire-engine, fire engine
bicycle: bicycle, bike
airplane: airplane, plane
rocket: rocket, spaceship
sailboat: sailboat, boat
house: house, home
alarm clock: alarm-clock, clock
sun: sun-with-face
moon: crescent-moon
star: star
rainbow: rainbow
snowman: snowman
umbrella: umbrella-with-rain-drops
fire: fire, flame
heart: red-heart
key: key
crown: crown
guitar: guitar
bell: bell
light bulb: light-bulb, lamp
camera: camera
diamond: gem-stone
pencil: pencil
book: closed-book
"""


@dataclass(frozen=True)
class Concept:
    """A thing to draw: its usual name, the emoji that shows it (Noto's icon name) and its other names."""

    name: str
    emoji: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def _parse(table: str) -> tuple[Concept, ...]:
    rows = []
    for line in table.strip().splitlines():
        name, _, rest = line.partition(":")
        emoji, *aliases = (part.strip() for part in rest.split(","))
        rows.append(Concept(name.strip(), emoji, tuple(aliases)))
    return tuple(rows)


CONCEPTS = _parse(_TABLE)


def with_article(words: str) -> str:
    """`an apple`, `a cat`, `cherries`: the words as a caption says them."""
    if words in PLURALS:
        return words
    return f"{'an' if words[0] in 'aeio' or words.startswith('um') else 'a'} {words}"


PLURALS = frozenset({"cherries", "grapes", "french fries", "fries", "corn", "broccoli", "fire", "coffee"})
