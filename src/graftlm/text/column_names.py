"""Names of columns: what a layout's columns are called elsewhere, and what other columns hold."""

CONTEXT = (
    *("system", "system_prompt", "tools", "functions", "documents", "history", "chat_template_kwargs"),
    *("images", "image", "videos", "audios"),
)
"""Columns that hold a part of what an answer answers."""

ENDS = ("finished", "ended")
SPEAKERS = ("system", "tools", "functions")
"""What conversations may have with their messages."""
BEFORE = ("history", "system_prompt", *SPEAKERS)
"""What a prompt may follow."""
CHOICES = ("choices", "options", "choice1", "option1", "ending0", "sol1")
ASIDE = (*CONTEXT, *CHOICES, "context", "passage", "input")
"""Columns that a completion may answer together with its prompt."""

Names = dict[str, tuple[str, ...]]
LABELS: Names = {
    "label": (
        *("label", "labels", "sentiment", "stars", "rating", "category", "class", "target"),
        *("emotion", "intent", "topic", "_label", "label_"),
    )
}
TEXTS: Names = {
    "text": ("sentence", "review", "content", "tweet", "question", "comment", "utterance", "headline", "_text")
}
TURN: Names = {
    "prompt": ("question", "query", "problem", "input", "document", "article", "dialogue"),
    "completion": ("response", "generation", "output", "answer", "solution", "summary", "highlights"),
    "system": ("system_prompt",),
    "label": ("kto_tag",),
}
PAIRED: Names = {
    "chosen": ("chosen_response", "chosen_answer", "response_j"),
    "rejected": ("rejected_response", "rejected_answer", "response_k"),
}
TASK: Names = {"output": ("response", "completion", "answer"), "input": ("context",), **TURN}
"""What columns are called elsewhere. A name that begins or ends with _ is a part of one: star_label, label_text."""

ABOUT_DOCUMENTS = {
    *("id", "url", "title", "source", "version", "meta", "metadata", "file_path", "dump"),
    *("date", "timestamp", "added", "created", "language", "language_score", "token_count"),
}
"""Columns that say where a document is from; they are not learned."""
