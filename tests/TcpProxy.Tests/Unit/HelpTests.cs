using System;
using System.IO;
using System.Linq;
using System.Text;
using Xunit;

namespace TcpProxy.Tests;

public sealed class HelpTests
{
    private const string Begin = "<!-- reference: made from the table of options; UPDATE_README=1 ./build.sh test Help -->\n";
    private const string End = "<!-- end of reference -->";

    [Fact]
    public void Both_helps_name_every_option_and_fit_a_terminal()
    {
        foreach (string help in new[] { Help.Short(), Help.Full() })
        {
            Assert.All(Option.Table, option => Assert.Contains($"--{option.Name}", help, StringComparison.Ordinal));
            Assert.All(help.Split('\n'), line => Assert.True(line.Length <= 110, line));
        }

        Assert.True(Help.Short().Length < Help.Full().Length);
        Assert.All(Option.Table.Where(o => o.Default.Length > 0),
            option => Assert.Contains($"({option.Default})", Help.Full(), StringComparison.Ordinal));
    }

    [Fact]
    public void The_reference_in_the_readme_is_the_table()
    {
        string readMe = Source.ReadMe;
        int begin = readMe.IndexOf(Begin, StringComparison.Ordinal) + Begin.Length;
        int end = readMe.IndexOf(End, StringComparison.Ordinal);
        Assert.True(begin >= Begin.Length && end >= begin, "README.md has no reference");
        string reference = Reference();
        if (Environment.GetEnvironmentVariable("UPDATE_README") == "1")
        {
            File.WriteAllText(Source.PathOf("README.md"), readMe[..begin] + reference + readMe[end..]);
            return;
        }

        Assert.Equal(reference, readMe[begin..end]);
    }

    [Fact]
    public void The_usage_in_the_readme_is_the_helps_own() =>
        Assert.Contains(Help.Usage.Trim(), Source.ReadMe, StringComparison.Ordinal);

    private static string Reference()
    {
        StringBuilder text = new();
        foreach (IGrouping<string, Option> group in Option.Table.GroupBy(option => option.Group))
        {
            text.Append(FormattableString.Invariant($"\n**{group.Key}**\n\n| option | default | meaning |\n|---|---|---|\n"));
            foreach (Option option in group)
            {
                string letter = option.Letter == '\0' ? "" : $"-{option.Letter}, ";
                string head = $"{letter}--{option.Name} {option.Value}".TrimEnd().Replace("|", "\\|", StringComparison.Ordinal);
                text.Append(FormattableString.Invariant($"| `{head}` | {option.Default} | {option.Help} |\n"));
            }
        }

        return text.Append('\n').ToString();
    }
}
