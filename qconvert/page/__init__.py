"""Reports as a page of HTML that a colleague can be sent: one file that needs nothing else.

`document` is the way in. A module a command says what its page holds, in the parts of
`qconvert.page.parts`; one template lays them out; pictures are SVG, drawn by `qconvert.page.svg`.
"""

from qconvert.page.document import document

__all__ = ["document"]
