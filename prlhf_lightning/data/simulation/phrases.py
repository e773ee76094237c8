"""The words of the style grammar: what people ask, what helps, and how each style puts it.

Every tip is a verb phrase in the base form, so that it fits every frame. Texts hold only words, single spaces and
the marks `. , ! ?`, so that a word-level tokenizer reads and writes them without loss.
"""

from __future__ import annotations

REQUESTS = (
    "How do I {topic}?",
    "How can I {topic}?",
    "What helps to {topic}?",
    "Help me {topic}.",
    "Any tips to {topic}?",
    "I want to {topic}.",
)

# topic -> tips that answer it
TIPS: dict[str, tuple[str, ...]] = {
    "sleep better": (
        "go to bed early",
        "keep the room dark",
        "skip late coffee",
        "put the phone away",
        "read a calm book",
        "open a window",
    ),
    "bake bread": (
        "use warm water",
        "knead the dough well",
        "let it rise twice",
        "preheat the oven",
        "add enough salt",
        "weigh the flour",
    ),
    "learn Spanish": (
        "practice every day",
        "listen to the radio",
        "talk to a neighbor",
        "learn ten words daily",
        "read short stories",
        "repeat aloud",
    ),
    "save money": (
        "write a budget",
        "cook at home",
        "cancel old subscriptions",
        "buy used things",
        "set a weekly limit",
        "compare prices",
    ),
    "give a speech": (
        "start with a story",
        "practice aloud",
        "speak slowly",
        "look at the audience",
        "keep it short",
        "breathe deeply",
    ),
    "grow tomatoes": (
        "find a sunny spot",
        "water the roots",
        "use rich soil",
        "tie up the stems",
        "pick them ripe",
        "remove weak leaves",
    ),
    "run faster": (
        "warm up first",
        "take short steps",
        "rest between runs",
        "train with a friend",
        "buy good shoes",
        "run up hills",
    ),
    "cook rice": (
        "rinse it well",
        "measure the water",
        "cover the pot",
        "lower the heat",
        "let it rest",
        "add a little salt",
    ),
    "stay calm": (
        "breathe deeply",
        "count to ten",
        "take a walk",
        "listen to music",
        "drink some water",
        "talk to a friend",
    ),
    "clean windows": (
        "use warm water",
        "add some vinegar",
        "wipe from the top",
        "dry with a cloth",
        "avoid direct sun",
        "change the water",
    ),
    "make good tea": (
        "warm the pot",
        "use fresh water",
        "wait three minutes",
        "buy loose leaves",
        "pour the milk last",
        "cover the cup",
    ),
    "find a job": (
        "update your resume",
        "ask old colleagues",
        "prepare for interviews",
        "apply every day",
        "write a clear letter",
        "learn a new skill",
    ),
    "train a puppy": (
        "reward good behavior",
        "keep sessions short",
        "stay patient",
        "use simple words",
        "practice every day",
        "take a long walk",
    ),
    "plan a trip": (
        "book early",
        "pack light",
        "write a budget",
        "compare prices",
        "check the weather",
        "leave free days",
    ),
    "paint a room": (
        "clean the walls",
        "cover the floor",
        "use a good brush",
        "start at the top",
        "paint two coats",
        "open a window",
    ),
    "host a dinner": (
        "plan a simple menu",
        "cook ahead",
        "set the table early",
        "play soft music",
        "ask about allergies",
        "light some candles",
    ),
    "read more books": (
        "carry a book",
        "join a library",
        "put the phone away",
        "read before bed",
        "choose fun titles",
        "set a daily goal",
    ),
    "wake up early": (
        "go to bed early",
        "set one alarm",
        "open the curtains",
        "skip late coffee",
        "plan a good breakfast",
        "move the alarm away",
    ),
    "take better photos": (
        "use morning light",
        "move closer",
        "hold the camera still",
        "clean the lens",
        "choose a simple background",
        "take many shots",
    ),
    "eat healthier": (
        "cook at home",
        "eat more vegetables",
        "drink some water",
        "plan a simple menu",
        "eat slowly",
        "carry some fruit",
    ),
}

# Keys are attribute values of a Style; each tuple holds interchangeable wordings.
OPENINGS = {
    "casual": ("Great question!", "Love this one!"),
    "formal": ("Thank you for asking.", "What a thoughtful question."),
}
OFFERS = {
    "casual": ("Want more ideas?", "Need anything else?"),
    "formal": ("May I assist you further?", "Shall I elaborate?"),
}
# (register, certainty) -> wordings of the first, the second and the third tip
FRAMES: dict[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    ("casual", "sure"): (
        ("Just {tip}.", "You gotta {tip}."),
        ("Then {tip}.", "Also {tip}."),
        ("Oh, and {tip}.",),
    ),
    ("casual", "careful"): (
        ("Maybe {tip}.", "You could {tip}."),
        ("Or maybe {tip}.", "Could also {tip}."),
        ("I guess you could {tip}.",),
    ),
    ("formal", "sure"): (
        ("It is essential to {tip}.", "One must {tip}."),
        ("Furthermore, {tip}.", "In addition, {tip}."),
        ("Finally, {tip}.",),
    ),
    ("formal", "careful"): (
        ("It may help to {tip}.", "Perhaps one might {tip}."),
        ("One might also {tip}.", "It seems wise to {tip}."),
        ("Possibly, {tip}.",),
    ),
}
