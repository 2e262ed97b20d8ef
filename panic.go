package transport

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// callerPanic is a panic in the caller's own reader or writer. It goes on in the caller's goroutine when everything has been cleaned up: in a
// goroutine of ours nobody could recover it.
type callerPanic struct {
	value any
	stack []byte
}

func (p *callerPanic) Error() string { return fmt.Sprintf("panic: %v\n\n%s", p.value, p.stack) }

func (p *callerPanic) Unwrap() error {
	err, _ := p.value.(error)
	return err
}

// guarded calls the caller's f. A panic becomes an error, for goOn.
func guarded(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &callerPanic{v, debug.Stack()}
		}
	}()
	return f()
}

// goOn lets a panic that became an error go on.
func goOn(err error) error {
	if p, ok := errors.AsType[*callerPanic](err); ok {
		panic(p)
	}
	return err
}
