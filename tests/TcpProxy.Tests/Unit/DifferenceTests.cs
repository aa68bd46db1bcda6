using System;
using System.IO;
using System.Linq;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>What a reload says it would change.</summary>
public sealed class DifferenceTests : IDisposable
{
    private readonly string _file = Path.GetTempFileName();

    public void Dispose()
    {
        File.Delete(_file);
        GC.SuppressFinalize(this);
    }

    [Theory]
    [InlineData("listen 1\nupstream a:1", "# a comment\n\nlisten 1\nupstream  a:1", "nothing is different")]
    [InlineData("listen 1\nupstream a:1", "listen 1\nupstream a:1\nlisten 2\nname two\nupstream a:1", "+ listen 2, route two (FILE:3)")]
    [InlineData("listen 1\nupstream a:1\nlisten 2\nupstream a:1", "listen 2\nupstream a:1", "- listen 1 (FILE:1)")]
    [InlineData("listen 1\nname web\nupstream a:1", "listen 2\nname web\nupstream a:1", "~ route web: listen 1 -> 2")]
    [InlineData("listen 1\nupstream a:1", "listen 1\nname web\nupstream a:1", "~ route 1: name web added")]
    [InlineData("listen 1\nname web\nupstream a:1", "listen 2\nname other\nupstream a:1", "- listen 1, route web (FILE:1)|+ listen 2, route other (FILE:1)")]
    [InlineData("listen 1\nupstream a:1", "listen 1\nupstream a:1 weight=3", "~ route 1: upstream a:1 -> a:1 weight=3")]
    [InlineData("listen 1\nupstream a:1", "listen 1\nupstream b:1", "~ route 1: upstream a:1 -> b:1")]
    [InlineData("listen 1\nupstream a:1\nupstream b:1", "listen 1\nupstream b:1 backup\nupstream c:1\nupstream d:1",
        "~ route 1: upstream a:1 removed, upstream b:1 -> b:1 backup, upstream c:1 added, upstream d:1 added")]
    [InlineData("listen 1\nupstream a:1\nupstream b:1", "listen 1\nupstream b:1\nupstream a:1", "~ route 1: the same in another order")]
    [InlineData("listen 1\nupstream a:1\nallow all\ndeny 1.2.3.4", "listen 1\nupstream a:1\ndeny 1.2.3.4\nallow all", "~ route 1: the same in another order")]
    [InlineData("retries 1\nlisten 1\nupstream a:1\nretries 2", "retries 3\nlisten 1\nupstream a:1\nretries 2", "nothing is different")]
    [InlineData("retries 1\nlisten 1\nupstream a:1\nlisten 2\nupstream a:1\nretries 2", "listen 1\nupstream a:1\nlisten 2\nupstream a:1\nretries 4",
        "~ route 1: retries 1 -> 3|~ route 2: retries 2 -> 4")]
    [InlineData("max-connections 5\nlisten 1\nupstream a:1", "max-connections 6\nlisten 1\nupstream a:1",
        "~ route 1: max-connections 5 -> 6|~ max-connections 5 -> 6")]
    [InlineData("listen 1\nupstream a:1\nclose-at-window-end\nreplace-up a=>b", "listen 1\nupstream a:1\nreplace-up a=>c\nsource 127.0.0.1",
        "~ route 1: close-at-window-end removed, replace-up a=>b -> a=>c, source 127.0.0.1 added")]
    [InlineData("listen 1\nupstream a:1\nthreads 2", "drain-timeout 1s\nlisten 1\nupstream a:1\nlog-file x\npid-file y",
        "~ drain-timeout 30s -> 1s|! only a restart changes this: threads 2 -> auto, log-file x added, pid-file y added")]
    [InlineData("listen 0\nupstream a:1\nlisten 0\nupstream b:1\nlisten 0\nname c\nupstream c:1", "listen 0\nname c\nupstream c:2\nlisten 0\nupstream a:1\nlisten 0\nupstream b:2",
        "~ route c: upstream c:1 -> c:2|~ route 0: upstream b:1 -> b:2")]
    public void It_is_said_in_the_words_of_the_options(string old, string next, string expected)
    {
        ArgumentNullException.ThrowIfNull(expected);
        Assert.Equal(expected.Replace("FILE", _file, StringComparison.Ordinal).Split('|'), Difference.Between(Read(old), Read(next)));
    }

    [Fact]
    public void The_command_line_still_wins()
    {
        Settings old = Read("listen 1\nupstream a:1\nretries 5", "--retries", "7", "-u", "b:1");
        Assert.Equal(["nothing is different"], Difference.Between(old, Read("listen 1\nupstream c:1\nretries 6", "--retries", "7", "-u", "b:1")));
    }

    [Fact]
    public void A_route_goes_on_from_that_of_its_name_or_else_of_its_address()
    {
        Settings old = Read("listen 1\nname a\nupstream x:1\nlisten 2\nname b\nupstream x:1\nlisten 3\nupstream x:1\nlisten 4\nupstream x:1");
        Settings next = Read("listen 3\nname c\nupstream x:1\nlisten 1\nname b\nupstream x:1\nlisten 2\nname a\nupstream x:1\nlisten 5\nupstream x:1");
        Assert.Equal([2, 1, 0, -1], Difference.Pair(next.Routes, old.Routes).Select(one => old.Routes.IndexOf(one!)));
    }

    [Fact]
    public void Lists_that_are_known_are_not_read_again()
    {
        string list = Path.GetTempFileName();
        try
        {
            File.WriteAllText(list, "10.0.0.1\n");
            Settings old = Read($"listen 1\nupstream a:1\ndeny @{list}");
            File.WriteAllText(list, "nonsense\n");
            File.WriteAllText(_file, $"listen 1\nupstream a:1\nallow @{list}");
            Settings next = CommandLine.Parse(["-c", _file], old);
            Assert.Same(Assert.Single(old.AccessFiles).Value, Assert.Single(next.AccessFiles).Value);
            File.WriteAllText(_file, "listen 1\nupstream a:1");
            Assert.Empty(CommandLine.Parse(["-c", _file], old).AccessFiles);
        }
        finally
        {
            File.Delete(list);
        }
    }

    private Settings Read(string text, params string[] words)
    {
        File.WriteAllText(_file, text);
        return CommandLine.Parse(["-c", _file, .. words]);
    }
}
