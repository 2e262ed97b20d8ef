package transport

import (
	"context"
	"io/fs"
	"os"
	"unicode/utf8"
)

// UploadTree is the [TreeUploader] of [UploadTree]. Over SFTP paths are absolute, which with dst may not have more than 4095 bytes, and symbolic links
// belong to the instance's root, whatever TreeOptions.Owner is.
func (t *LXD) UploadTree(ctx context.Context, dst string, src fs.FS, opts *TreeOptions) (TreeStats, error) {
	return uploadTree(ctx, t.forTree(dst), dst, src, opts, func(ctx context.Context, tr *tree) error {
		return t.transferTree(ctx, func(ctx context.Context, s *session) error {
			if s == nil {
				return tr.uploadSingly(ctx, t, dst, src)
			}
			return tr.uploadSFTP(ctx, s, dst, src)
		})
	})
}

// DownloadTree is the [TreeDownloader] of [DownloadTree]. Over SFTP paths are absolute, which with src may not have more than 4095 bytes.
func (t *LXD) DownloadTree(ctx context.Context, src string, dst *os.Root, opts *TreeOptions) (TreeStats, error) {
	return downloadTree(ctx, t.forTree(src), src, dst, opts, func(ctx context.Context, into *sink) error {
		return t.transferTree(ctx, func(ctx context.Context, s *session) error {
			if s == nil {
				return into.downloadSingly(ctx, t, src, into)
			}
			return into.downloadSFTP(ctx, s, src, into)
		})
	})
}

// forTree is the transport for the host's tar. LXD's JSON has no arguments but UTF-8: there is no tar for other paths.
func (t *LXD) forTree(remote string) Transport {
	if utf8.ValidString(remote) {
		return t
	}
	return withoutShell{t}
}

// withoutShell is a transport into a host that has no command.
type withoutShell struct{ Transport }

func (withoutShell) Exec(context.Context, Command) error { return &ExitError{Code: 127} }

// transferTree runs f with a session of its own, which is not used again after a failure: much may be under way in it.
func (t *LXD) transferTree(ctx context.Context, f func(context.Context, *session) error) error {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s, err := t.session(ctx, true)
	switch {
	case err == errNoSFTP:
		return f(ctx, nil)
	case err != nil:
		return orCause(ctx, err)
	}
	err = orCause(ctx, f(ctx, s))
	t.release(s, err != nil)
	return err
}
