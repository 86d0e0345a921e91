"""Eight short reviews with worked reasoning, written for this project: what chain-of-thought prompts show."""

from graftlm.text.problems import Problem

WORKED_REVIEWS = (
    Problem(
        "two hours of shouting, and not one scene in which anybody listens .",
        "negative",
        "The reviewer complains of shouting and says that no scene works. Nothing is praised.",
    ),
    Problem(
        "a small film with a large heart , and the last ten minutes are worth the whole evening .",
        "positive",
        "The film is said to have a large heart, and its ending to be worth the evening. Both are praise.",
    ),
    Problem(
        "the camera finds beauty in every kitchen and every bus stop .",
        "positive",
        "Finding beauty in plain places is praise of how the film looks.",
    ),
    Problem(
        "handsome to look at, but the story has been told a dozen times, and told better .",
        "negative",
        "The looks are praised, but the story is called old and badly told, and that is the last word.",
    ),
    Problem(
        "it starts slowly and then, without your noticing, it has you .",
        "positive",
        "A slow start is a small fault. In the end the film holds its viewer, so the reviewer likes it.",
    ),
    Problem(
        "if you laughed at the trailer, you have heard all the jokes there are .",
        "negative",
        "All the jokes are in the trailer, so the film itself has nothing more to offer.",
    ),
    Problem(
        "a sequel that nobody asked for and that nobody, it seems, cared to write .",
        "negative",
        "Nobody asked for the sequel and nobody cared to write it well. Both are blame.",
    ),
    Problem(
        "the two leads are so good together that you forgive the film its tidy ending .",
        "positive",
        "The ending is called too tidy, but the leads are so good that it is forgiven. On the whole that is praise.",
    ),
)
