package job

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// document reads YAML or JSON into nodes that know their lines and columns. A file that begins with a brace is JSON and is
// read as such: YAML is not quite a superset of it (tabs, surrogate pairs).
func document(data []byte) (*yaml.Node, error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	first := bytes.TrimLeft(data, " \t\r\n")
	if len(first) == 0 || first[0] != '{' {
		return yamlDocument(data)
	}
	n, err := jsonDocument(data)
	if err != nil && !json.Valid(data) {
		// What is no JSON may be a mapping of YAML in braces.
		if n, err := yamlDocument(data); err == nil {
			return n, nil
		}
	}
	return n, err
}

func yamlDocument(data []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var n yaml.Node
	if err := dec.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, &SyntaxError{Line: 1, Column: 1, Text: "the file is empty"}
		}
		return nil, yamlError(err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); err == nil {
		return nil, &SyntaxError{Line: more.Line, Column: more.Column, Text: "the file has a second document"}
	} else if !errors.Is(err, io.EOF) {
		return nil, yamlError(err)
	}
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		return n.Content[0], nil
	}
	return &n, nil
}

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) error {
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ := strconv.Atoi(m[1])
		return &SyntaxError{Line: line, Column: 1, Text: m[2]}
	}
	return &SyntaxError{Line: 1, Column: 1, Text: err.Error()}
}

// jsonReader turns the tokens of encoding/json into the nodes that yaml has.
type jsonReader struct {
	dec   *json.Decoder
	data  []byte
	lines []int // offsets of their beginnings
}

func jsonDocument(data []byte) (*yaml.Node, error) {
	r := &jsonReader{dec: json.NewDecoder(bytes.NewReader(data)), data: data, lines: []int{0}}
	r.dec.UseNumber()
	for i, b := range data {
		if b == '\n' {
			r.lines = append(r.lines, i+1)
		}
	}
	var all json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		p := r.at(len(data))
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok && int(syntax.Offset) <= len(data) {
			p = r.at(max(0, int(syntax.Offset)-1))
		}
		return nil, &SyntaxError{Line: p.line, Column: p.column, Text: err.Error()}
	}
	return r.value(0)
}

// position is where the next token begins.
func (r *jsonReader) position() position {
	i := int(r.dec.InputOffset())
	for i < len(r.data) && bytes.IndexByte([]byte(" \t\r\n,:"), r.data[i]) >= 0 {
		i++
	}
	return r.at(i)
}

func (r *jsonReader) at(offset int) position {
	line := sort.Search(len(r.lines), func(i int) bool { return r.lines[i] > offset }) - 1
	return position{line + 1, offset - r.lines[line] + 1}
}

func (r *jsonReader) token() (json.Token, position, error) {
	p := r.position()
	t, err := r.dec.Token()
	if err == nil {
		return t, p, nil
	}
	return nil, p, &SyntaxError{Line: p.line, Column: p.column, Text: err.Error()}
}

func (r *jsonReader) value(depth int) (*yaml.Node, error) {
	t, p, err := r.token()
	if err != nil {
		return nil, err
	}
	if depth > maxDepth {
		return nil, &SyntaxError{Line: p.line, Column: p.column, Text: "too deeply nested"}
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Line: p.line, Column: p.column}
	switch t := t.(type) {
	case string:
		n.Tag, n.Value = "!!str", t
	case json.Number:
		n.Tag, n.Value = "!!float", t.String()
	case bool:
		n.Tag, n.Value = "!!bool", strconv.FormatBool(t)
	case nil:
		n.Tag, n.Value = "!!null", "null"
	case json.Delim:
		n.Kind, n.Tag = yaml.MappingNode, "!!map"
		if t == '[' {
			n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
		}
		for r.dec.More() {
			child, err := r.value(depth + 1)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, child)
		}
		if _, _, err := r.token(); err != nil {
			return nil, err
		}
		if n.Kind == yaml.MappingNode && len(n.Content)%2 != 0 {
			return nil, &SyntaxError{Line: p.line, Column: p.column, Text: "a key has no value"}
		}
	default:
		return nil, &SyntaxError{Line: p.line, Column: p.column, Text: fmt.Sprintf("unexpected %v", t)}
	}
	return n, nil
}
