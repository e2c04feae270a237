"""STUB of TextStream until that of the scripts is there."""


class TextStream:
    def __init__(self, processor):
        self.processor, self.ids, self.shown = processor, [], ""

    def add(self, token):
        self.ids.append(token)
        text = self.processor.decode(self.ids)
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def end(self):
        return self.processor.decode(self.ids)[len(self.shown) :]
