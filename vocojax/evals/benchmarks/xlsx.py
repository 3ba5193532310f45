"""A table as an Excel file, with the standard library alone.

An Excel file is a zip of XML files. The least that readers accept is one sheet
of numbers and strings; it saves a dependency for one submission file.
"""

import io
import re
import zipfile
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_FILES = {
  "[Content_Types].xml": (
    f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType='
    '"application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    f'ContentType="{_TYPE}.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    f'ContentType="{_TYPE}.worksheet+xml"/></Types>'
  ),
  "_rels/.rels": (
    f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
    f'Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/>'
    "</Relationships>"
  ),
  "xl/workbook.xml": (
    f'<workbook xmlns="{_SHEETS}" xmlns:r="{_OFFICE}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'
  ),
  "xl/_rels/workbook.xml.rels": (
    f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
    f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
    "</Relationships>"
  ),
}
# XML 1.0 has no way to write these.
_FORBIDDEN = re.compile(
  "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_MAX_CELL = 32_767  # characters; Excel refuses more


def xlsx(rows: Iterable[Sequence[str | int]]) -> bytes:
  """Rows of strings and numbers as an Excel file of one sheet.

  Characters that XML does not know are left out, and what exceeds the longest
  cell of Excel.
  """
  cells = "".join(
    f"<row>{''.join(_cell(value) for value in row)}</row>" for row in rows
  )
  sheet = (
    f'<worksheet xmlns="{_SHEETS}"><sheetData>{cells}</sheetData></worksheet>'
  )
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, text in (*_FILES.items(), ("xl/worksheets/sheet1.xml", sheet)):
      archive.writestr(name, _HEAD + text)
  return content.getvalue()


def _cell(value: str | int) -> str:
  if isinstance(value, int):
    return f"<c><v>{value}</v></c>"
  text = escape(_FORBIDDEN.sub("", value)[:_MAX_CELL])
  return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
