"""Published sets: from a record in its published form to a Question. A reader is a function of a Row and of whether the prompt is a chat."""
