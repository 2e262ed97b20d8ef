package job

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Condition is what only_if, not_if and fail_if hold: two operands and an operator, as in
//
//	'%{github_branch}' == 'master'
//	%{cobertura_line_rate} < 85%
//
// An operand in single quotes is a text; another one is a number, which may be a percentage, or a variable. == compares texts without
// regard to case, === and eq with it; != and ne are their opposites, with it. Numbers are compared by these as
// well, and by < <= > >= lt le gt ge. A text without quotes can only come from a variable.
type Condition struct {
	left, right operand
	operator    string
	source      string
}

// operand is a text that may contain variables.
type operand struct {
	text   string
	quoted bool
}

func (c *Condition) String() string { return c.source }

var (
	quotedOperands = regexp.MustCompile(`^'(.*)' +(\S+) +'(.*)'$`)
	number         = regexp.MustCompile(`^-?(\d+|\d*\.\d+)%?$`)
	bareVariable   = regexp.MustCompile(`^%\{[^{}]*\}%?$`)
)

// parseCondition reads a condition before its variables are known, so that no value of a variable is taken for a part of it.
func parseCondition(s string) (*Condition, error) {
	c := &Condition{source: s}
	s = strings.TrimSpace(s)
	if m := quotedOperands.FindStringSubmatch(s); m != nil && isOperator(m[2]) {
		c.left, c.operator, c.right = operand{m[1], true}, m[2], operand{m[3], true}
	} else {
		var err error
		var rest string
		if c.left, rest, err = parseOperand(s); err != nil {
			return nil, err
		}
		c.operator, rest, _ = strings.Cut(strings.TrimSpace(rest), " ")
		if !isOperator(c.operator) {
			return nil, fmt.Errorf("unknown operator %q in the condition %q: known are == === != eq ne < <= > >= lt le gt ge", c.operator, c.source)
		}
		if c.right, rest, err = parseOperand(strings.TrimSpace(rest)); err != nil {
			return nil, err
		}
		if strings.TrimSpace(rest) != "" {
			return nil, fmt.Errorf("the condition %q has something behind its end", c.source)
		}
	}
	if (c.left.quoted || c.right.quoted) && ordering(c.operator) {
		return nil, fmt.Errorf("the operator %q of the condition %q compares numbers, not texts in quotes", c.operator, c.source)
	}
	for _, pair := range [][2]operand{{c.left, c.right}, {c.right, c.left}} {
		if pair[0].quoted && !pair[1].quoted && !bareVariable.MatchString(pair[1].text) {
			return nil, fmt.Errorf("the condition %q compares a text with a number", c.source)
		}
	}
	return c, nil
}

func isOperator(s string) bool {
	switch s {
	case "==", "===", "!=", "eq", "ne":
		return true
	}
	return ordering(s)
}

func ordering(s string) bool {
	switch s {
	case "<", "lt", ">", "gt", "<=", "le", ">=", "ge":
		return true
	}
	return false
}

func parseOperand(s string) (o operand, rest string, err error) {
	if strings.HasPrefix(s, "'") {
		text, rest, ok := strings.Cut(s[1:], "'")
		if !ok {
			return o, "", fmt.Errorf("the quote before %q does not end", s[1:])
		}
		return operand{text, true}, rest, nil
	}
	end := strings.IndexByte(s, ' ')
	if v := strings.IndexByte(s, '}'); strings.HasPrefix(s, "%{") && v >= 0 {
		end = strings.IndexByte(s[v:], ' ')
		if end >= 0 {
			end += v
		}
	}
	if end < 0 {
		end = len(s)
	}
	word := s[:end]
	if !number.MatchString(word) && !bareVariable.MatchString(word) {
		return o, "", fmt.Errorf("%q is neither a number nor a variable nor a text in single quotes", word)
	}
	return operand{text: word}, s[end:], nil
}

// Holds evaluates the condition with the values of a job's context. It is an error if what should be a number is none.
func (c *Condition) Holds(vars map[string]string) (bool, error) {
	left, right := expand(c.left.text, vars), expand(c.right.text, vars)
	if !c.left.quoted && !c.right.quoted {
		l, lerr := parseNumber(left)
		r, rerr := parseNumber(right)
		switch {
		case lerr == nil && rerr == nil:
			return compareNumbers(l, c.operator, r), nil
		case ordering(c.operator) && lerr != nil:
			return false, fmt.Errorf("the condition %q: %w", c.source, lerr)
		case ordering(c.operator):
			return false, fmt.Errorf("the condition %q: %w", c.source, rerr)
		}
	}
	switch c.operator {
	case "==":
		return strings.EqualFold(left, right), nil
	case "!=", "ne":
		return left != right, nil
	default: // ===, eq
		return left == right, nil
	}
}

// parseNumber reads a number or a percentage. Nothing is 0, as in Cyclid, where it is what a variable without a value leaves.
func parseNumber(s string) (float64, error) {
	s = strings.TrimSuffix(strings.TrimSpace(s), "%")
	if s == "" {
		return 0, nil
	}
	if !number.MatchString(s) {
		return 0, fmt.Errorf("%.40q is not a number", s)
	}
	return strconv.ParseFloat(s, 64)
}

func compareNumbers(l float64, operator string, r float64) bool {
	switch operator {
	case "<", "lt":
		return l < r
	case ">", "gt":
		return l > r
	case "<=", "le":
		return l <= r
	case ">=", "ge":
		return l >= r
	case "!=", "ne":
		return l != r
	}
	return l == r
}

// condition is a key's value as a condition, nil if it is not there.
func (m *mapping) condition(key string) *Condition {
	s := m.text(key)
	if s == "" {
		return nil
	}
	c, err := parseCondition(s)
	if err != nil {
		m.p.fail(m.where(key), "%q: %v", key, err)
		return nil
	}
	return c
}
